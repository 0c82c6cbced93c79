"""Moving an adapter from its source base to a target base."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import methods
from .adapters.model import Adapter, AdapterLayer, LoraLayer, LoraXLayer, expand
from .base import Base
from .errors import MismatchError, OptionError
from .layers import Layer
from .linalg import Subspace, decompose
from .progress import Progress, silent
from .report import ARRIVED, BOTH_RESIZED, Outcome, Row, TransferReport
from .similarity import Score, Similarity, check_rank, pair_scores
from .version import __version__

FORMATS = ("lora", "lora-x")
# The paper's setting for every pair of bases (arXiv 2501.16559, section 5).
RANK = 320
# What unrelated layers score after the correction: a layer that is no better than chance gets no update.
THRESHOLD = 0.0


def transfer_adapter(
    adapter: Adapter,
    source: Base,
    target: Base,
    *,
    method: str = "auto",
    rank: int | None = None,
    threshold: float = THRESHOLD,
    output_format: str = "lora",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    strict: bool = False,
    similarity: Similarity | None = None,
    progress: Progress = silent,
) -> tuple[Adapter, TransferReport]:
    """Move an adapter to another base, layer by layer, pairing layers by name.

    Args:
        adapter: The adapter, made for `source`.
        source: The base that it was made for.
        target: The base that it shall work on.
        method: `project`, `index`, `align`, `subspace-null`, `copy` (see `lorax.methods`), or `auto`: `project` for
            LoRA-X layers, `copy` for others, and `align` where the sizes differ.
        rank: Singular triplets of each weight that make its leading subspace (a smaller layer uses all that it has);
            None means 320, also for bases that have no layer of that size.
        threshold: A layer whose corrected similarity (the lower of both sides) is not above this gets no update.
        output_format: `lora`: factors of the rank of the input; `lora-x`: singular values of the target.
        dtype: Of the factors of the result; None takes that of the input. Half precision rounds by 3e-4.
        device: Where to compute, such as `cpu` or `cuda`.
        strict: Raise if any layer gets no update.
        similarity: A comparison of these two bases; its scores are used instead of comparing the layers again.
        progress: Called with (done, total, layer name); an exception that it raises stops the work.

    Returns:
        The adapter for the target, with where it came from in its metadata, and a report with a row for every layer.

    Raises:
        OptionError: An option is unknown or out of range.
        MismatchError: The adapter does not belong to the source, nothing can be transferred, or `strict` is broken.
        NumericsError: A weight holds NaN or Inf.
    """
    for name, value, known in (("method", method, methods.METHODS), ("format", output_format, FORMATS)):
        if value not in known:
            raise OptionError(f"unknown {name}", value, f"choose one of {', '.join(known)}")
    if not (math.isfinite(threshold) and threshold < 1):
        raise OptionError("the threshold is out of range", str(threshold), "give a number below 1")
    check_rank(rank, [*source.layers.values(), *target.layers.values()])
    rank = RANK if rank is None else rank
    adapter = adapter.resolved(source)
    _check_belongs(adapter, source, target)
    if similarity is not None and similarity.identities != (source.identity(), target.identity()):
        got = f"it compared {similarity.source} and {similarity.target}"
        raise MismatchError("the similarity is of other bases", got, "compare source and target of this transfer")
    options = _Options(method, rank, threshold, output_format, dtype, device, _scores(similarity))
    report = TransferReport(
        adapter.name, source.name, target.name, method, rank, threshold, unused=dict(adapter.unused)
    )
    moved: dict[str, AdapterLayer] = {}
    place = {name: i for i, name in enumerate(source.layers)}
    todo = sorted(adapter.layers.values(), key=lambda own: (place.get(own.layer.name, len(place)), own.layer.name))
    for done, own in enumerate(todo, 1):
        row, result = _move(own, source, target, options)
        report.rows.append(row)
        if result is not None:
            moved[result.layer.name] = result
        progress(done, len(todo), own.layer.name)
    if not moved:
        why = ", ".join(f"{count} {outcome}" for outcome, count in report.outcomes.items())
        raise MismatchError("no layer of the adapter can be transferred", why, "check source, target and threshold")
    if strict and len(moved) < len(report.rows):
        row = next(row for row in report.rows if row.outcome not in ARRIVED)
        got = f"{len(report.rows) - len(moved)} of {len(report.rows)}, the first {row.source} ({row.outcome})"
        raise MismatchError("strict: layers get no update", got, "drop --strict to go on without them")
    metadata = {
        **adapter.metadata,
        "lorax_version": __version__,
        "lorax_source": source.name,
        "lorax_target": target.name,
        "lorax_method": method,
        "lorax_rank": str(rank),
        "lorax_threshold": f"{threshold:g}",
    }
    return Adapter(adapter.name, target.family, adapter.naming, moved, {}, metadata), report


@dataclass(frozen=True, slots=True)
class _Options:
    method: str
    rank: int
    threshold: float
    output_format: str
    dtype: torch.dtype | None
    device: str
    scores: Mapping[tuple[str, str], tuple[Score, Score]]


def _scores(similarity: Similarity | None) -> dict[tuple[str, str], tuple[Score, Score]]:
    kinds = similarity.kinds if similarity else []
    return {
        (source.name, target.name): (kind.left[i][j], kind.right[i][j])
        for kind in kinds
        for i, source in enumerate(kind.sources)
        for j, target in enumerate(kind.targets)
    }


def _check_belongs(adapter: Adapter, source: Base, target: Base) -> None:
    """Refuse an adapter no layer of which is in the source, and say so where source and target are swapped."""
    layers = [own for own in adapter.layers.values() if own.layer.component in source.components]
    if not layers:
        return

    def fitting(base: Base) -> int:
        if isinstance(layers[0], LoraXLayer):
            return sum(own.layer.name in base.layers for own in layers)
        found = ((own.layer, base.layers.get(own.layer.name)) for own in layers)
        return sum(layer is not None and own.matrix_shape == layer.matrix_shape for own, layer in found)

    if not fitting(source):
        raise MismatchError(
            "the adapter does not belong to the source base",
            f"{adapter.name} and {source.name} ({source.family.label})",
            "swap source and target" if fitting(target) else "give the base that it was made for",
        )


def _move(own: AdapterLayer, source: Base, target: Base, options: _Options) -> tuple[Row, AdapterLayer | None]:
    """Pair one layer, compare its two weights, and move its update."""
    name = own.layer.name
    row = Row(name, name if name in target.layers else "", Outcome.TRANSFERRED, source_norm=own.norm())
    row = _pair(row, own, source, target, options.method)
    if row.outcome is Outcome.KEPT:
        return row, own
    if row.outcome is not Outcome.TRANSFERRED:
        return row, None
    weight_s, weight_t = source.weight(name, options.device), target.weight(name, options.device)
    left, right = options.scores.get((name, name)) or pair_scores(weight_s, weight_t)
    row = replace(row, left=left, right=right)
    if row.corrected <= options.threshold:
        return replace(row, outcome=Outcome.BELOW_THRESHOLD), None
    B, A = expand(own, source, options.device)
    layer, method, lora_x = target.layers[name], row.method, options.output_format == "lora-x"
    space_t = decompose(weight_t, options.rank) if method != "copy" or lora_x else None
    if space_t is not None and method != "copy":
        space_s = decompose(weight_s, options.rank) if method != "project" else space_t
        B, A = _APPLY[method](B, A, space_s, space_t)
        row = replace(row, note=_note(source.layers[name], layer, space_t))
    if space_t is not None and lora_x:
        result: AdapterLayer = LoraXLayer(layer, space_t.singular_change(B, A).cpu(), target.fingerprint(name))
    elif method == "copy" and isinstance(own, LoraLayer):
        dtype = options.dtype or own.dtype
        result = replace(own, layer=layer, lora_up=own.lora_up.to(dtype), lora_down=own.lora_down.to(dtype))
    else:
        result = _like(own, layer, B, A, options.dtype or own.dtype)
    return replace(row, rank=space_t.rank if space_t else 0, target_norm=result.norm()), result


def _pair(row: Row, own: AdapterLayer, source: Base, target: Base, wanted: str) -> Row:
    """Choose the method for a layer, or the outcome where there is nothing to do."""
    component = own.layer.component
    layer_s, layer_t = source.layers.get(row.source), target.layers.get(row.source)
    if isinstance(own, LoraLayer) and not (component in source.components and component in target.components):
        note = f"{component} is not in both bases"
        return replace(row, target=row.source, outcome=Outcome.KEPT, target_norm=row.source_norm, note=note)
    if layer_s is None or layer_t is None:
        return replace(row, outcome=Outcome.NO_TARGET_LAYER if layer_s else Outcome.NO_SOURCE_LAYER)
    sizes, sizes_t = layer_s.matrix_shape, layer_t.matrix_shape
    if isinstance(own, LoraLayer) and own.layer.matrix_shape != sizes:
        note = f"adapter {own.layer.matrix_shape}, source {sizes}"
        return replace(row, outcome=Outcome.SHAPE_MISMATCH, note=note)
    method = _method(wanted, own, resized=sizes != sizes_t)
    if method in ("copy", "project", "subspace-null") and sizes != sizes_t:
        note = f"{method} needs equal sizes, source {sizes}, target {sizes_t}"
        return replace(row, outcome=Outcome.SHAPE_MISMATCH, note=note)
    return replace(row, method=method)


def _note(source: Layer, target: Layer, space: Subspace) -> str:
    (m, n), (m_t, n_t) = source.matrix_shape, target.matrix_shape
    if m != m_t and n != n_t:
        return BOTH_RESIZED
    whole = [side for side, size in (("output", m_t), ("input", n_t)) if space.rank == size]
    return f"the subspace is all of the {' and the '.join(whole)} side: no projection there" if whole else ""


def _method(wanted: str, own: AdapterLayer, *, resized: bool) -> str:
    if wanted != "auto":
        return wanted
    if resized:
        return "align"
    return "project" if isinstance(own, LoraXLayer) else "copy"


_APPLY: dict[str, Callable[[Tensor, Tensor, Subspace, Subspace], methods.Factors]] = {
    "project": lambda B, A, s, t: methods.project(B, A, t),
    "index": methods.index,
    "align": methods.align,
    "subspace-null": methods.subspace_null,
}


def _like(own: AdapterLayer, layer: Layer, B: Tensor, A: Tensor, dtype: torch.dtype) -> LoraLayer:
    """Return factors as a LoRA layer with the alpha of the layer that they came from."""
    alpha = own.alpha if isinstance(own, LoraLayer) else None
    scale = own.scale if isinstance(own, LoraLayer) and own.scale else 1.0
    return LoraLayer(layer, (B / scale).to("cpu", dtype), A.to("cpu", dtype), alpha)
