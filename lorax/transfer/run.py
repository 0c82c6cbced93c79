"""Moving an adapter from its source base to a target base."""

import math
from dataclasses import replace

import torch

from ..adapters import Adapter, AdapterLayer, LoraXLayer
from ..checks import check_positive, check_rank
from ..compare.matching import Assignment, match_bases
from ..compare.scores import PairScores
from ..compare.similarity import Similarity
from ..compute.engine import CPU, Engine
from ..errors import MismatchError, OptionError
from ..models.base import Base
from ..models.layers import Layer
from ..options import DORA, FORMATS, LORA_RANK, METHODS, RANK, THRESHOLD
from ..progress import Progress, silent
from ..version import __version__
from .move import Mover
from .notes import Code, Note
from .report import Outcome, Row, TransferReport


def transfer_adapter(
    adapter: Adapter,
    source: Base,
    target: Base,
    *,
    method: str = "auto",
    rank: int | None = None,
    lora_rank: int = LORA_RANK,
    threshold: float = THRESHOLD,
    matching: str = "auto",
    assignment: Assignment | None = None,
    dora: str = "direction",
    output_format: str = "lora",
    dtype: torch.dtype | None = None,
    engine: Engine = CPU,
    strict: bool = False,
    similarity: Similarity | None = None,
    progress: Progress = silent,
) -> tuple[Adapter, TransferReport]:
    """Move an adapter to another base, layer by layer.

    Args:
        adapter: The adapter, made for `source`.
        source: The base that it was made for.
        target: The base that it shall work on.
        method: `orthogonal`, `copy`, `project`, `subspace-null`, `index`, `align` (see `lorax.transfer.methods`), or
            `auto`: `orthogonal` for what is low-rank, `copy` (onto the paired layer) for what is not, `align` where the
            sizes differ; see docs/results.md.
        rank: Singular triplets of each weight that make its leading subspace (a smaller layer uses all that it has);
            None means 320, also for bases that have no layer of that size.
        lora_rank: Rank of the LoRA that an update of another kind (LoHa, LoKr, full difference, ...) becomes where it
            cannot be copied as it is.
        threshold: A layer whose corrected similarity (the lower of both sides) is not above this gets no update.
        matching: How blocks of the two bases are paired; see `lorax.compare.matching.match_bases`.
        assignment: The pairs, where they are known already; `matching` is then not used.
        dora: `direction`: the update of a DoRA moves without its magnitude, which follows in its ratio to the weight's;
            `dense`: what the whole DoRA changes is moved, as a LoRA.
        output_format: `lora`: factors of the rank of the input; `lora-x`: singular values of the target.
        dtype: Of the factors of the result; None takes that of the input. Half precision rounds by 3e-4.
        engine: How and where to compute.
        strict: Raise unless all layers of the file arrive, those that could not be read too.
        similarity: A comparison of these two bases; its scores are used instead of comparing the layers again.
        progress: Called with (done, total, layer name); an exception that it raises stops the work.

    Returns:
        The adapter for the target, with where it came from in its metadata, and a report with a row for every layer.

    Raises:
        OptionError: An option is unknown or out of range.
        MismatchError: The adapter does not belong to the source, nothing can be transferred, or `strict` is broken.
        NumericsError: A weight holds NaN or Inf, or an update grows beyond the dtype of its result.
    """
    for name, value, choices in (
        ("method", method, METHODS),
        ("format", output_format, FORMATS),
        ("way to move a DoRA", dora, DORA),
    ):
        if value not in choices:
            raise OptionError(f"unknown {name}", value, f"choose one of {', '.join(choices)}")
    _check_numbers(rank, lora_rank, threshold, source, target)
    rank = RANK if rank is None else rank
    adapter = adapter.resolved(source)
    _check_belongs(adapter, source, target)
    with engine.remembering(source, target):
        identities = source.identity(), target.identity()
        if similarity is not None and similarity.identities != identities:
            got = f"it compared {similarity.source} and {similarity.target}"
            raise MismatchError("the similarity is of other bases", got, "compare source and target of this transfer")
        known = PairScores() if similarity is None else similarity.scores
        if assignment is None:
            assignment = match_bases(source, target, matching, known=known, engine=engine, progress=progress)
        report = TransferReport(
            adapter.name, source.name, target.name, method, rank, threshold, assignment, unused=dict(adapter.unused)
        )
        mover = Mover(
            source,
            target,
            _targets(assignment, target),
            (assignment.scores, known),
            method,
            rank,
            lora_rank,
            threshold,
            dora,
            output_format == "lora-x",
            dtype,
            engine,
        )
        moved: dict[str, AdapterLayer] = {}
        place = {name: i for i, name in enumerate(source.layers)}
        todo = sorted(adapter.layers.values(), key=lambda own: (place.get(own.layer.name, len(place)), own.layer.name))
        for done, own in enumerate(todo, 1):
            for row, result in _kept(own, source, target, assignment) or mover.move(own):
                if result is not None and result.layer.name in moved:
                    row, result = replace(row, outcome=Outcome.TWICE, notes=(Note(Code.FED_ALREADY),)), None
                report.rows.append(row)
                if result is not None:
                    moved[result.layer.name] = result
            progress(done, len(todo), own.layer.name)
    for name, why in adapter.unread.items():
        report.rows.append(Row(name, "", Outcome.UNREAD, notes=(Note.of(Code.UNREAD, why=why),)))
    _check_arrived(report, strict)
    metadata = {
        **adapter.metadata,
        "lorax_version": __version__,
        "lorax_source": source.name,
        "lorax_source_identity": identities[0],
        "lorax_target": target.name,
        "lorax_target_identity": identities[1],
        "lorax_method": method,
        "lorax_rank": str(rank),
        "lorax_threshold": f"{threshold:g}",
        "lorax_matching": assignment.matching,
    }
    return Adapter(adapter.name, target.family, adapter.naming, moved, {}, metadata), report


def _check_arrived(report: TransferReport, strict: bool) -> None:
    if not report.arrived:
        why = ", ".join(f"{count} {outcome}" for outcome, count in report.outcomes.items())
        raise MismatchError("no layer of the adapter can be transferred", why, "check source, target and threshold")
    if strict and report.missing:
        row = report.missing[0]
        got = f"{len(report.missing)} of {report.layers}, the first {row.source} ({row.outcome})"
        raise MismatchError("strict: layers get no update", got, "drop --strict to go on without them")


def _check_numbers(rank: int | None, lora_rank: int, threshold: float, source: Base, target: Base) -> None:
    check_rank(rank, [*source.layers.values(), *target.layers.values()])
    check_positive(lora_rank, "lora_rank")
    if not (math.isfinite(threshold) and threshold < 1):
        raise OptionError("the threshold is out of range", str(threshold), "give a number below 1")


def _targets(assignment: Assignment, target: Base) -> dict[str, list[str]]:
    """Return for each source layer, norm and bias the target's that it feeds."""
    fed: dict[str, list[str]] = {}
    for name in (*target.layers, *target.vectors):
        fed.setdefault(assignment.source_of(name), []).append(name)
    return fed


def _kept(
    own: AdapterLayer, source: Base, target: Base, assignment: Assignment
) -> list[tuple[Row, AdapterLayer | None]]:
    """Return the move of a layer of a component that a base lacks: it is kept, if the target's family has it."""
    component = own.layer.component
    place = {s: t for t, s in assignment.components.items()}.get(component, component)
    if isinstance(own, LoraXLayer) or (component in source.components and place in target.components):
        return []
    if component in source.components and not any(e.component == place for e in target.family.text_encoders):
        return []
    name = f"{place}.{own.layer.path}"
    norm = math.nan if own.needs_weight else own.norm()
    note = Note.of(Code.NOT_IN_BOTH, component=component)
    row = Row(own.layer.name, name, Outcome.KEPT, source_norm=norm, target_norm=norm, notes=(note,))
    return [(row, replace(own, layer=replace(own.layer, name=name)))]


def _check_belongs(adapter: Adapter, source: Base, target: Base) -> None:
    """Refuse an adapter of the target, or no layer of which is in the source."""
    layers = [
        own for own in adapter.layers.values() if own.layer.component in source.components and own.layer.shape != ()
    ]
    layers = layers or [own for own in adapter.layers.values() if isinstance(own, LoraXLayer)]
    if not layers:
        return

    def fitting(base: Base) -> set[str]:
        return {own.layer.name for own in layers if _fits(own, base)}

    in_source, in_target = fitting(source), fitting(target)
    if not in_source:
        raise MismatchError(
            "the adapter does not belong to the source base",
            f"{adapter.name} and {source.name} ({source.label})",
            "swap source and target" if in_target else "give the base that it was made for",
        )
    if len(in_source) < len(in_target) == len(layers):
        first = next(own.layer.name for own in layers if own.layer.name not in in_source)
        got = f"{adapter.name}: {first} is in {target.name} and not in {source.name}"
        fix = "use it as it is; if source and target are swapped, swap them"
        raise MismatchError("the adapter is made for the target already", got, fix)


def _fits(own: AdapterLayer, base: Base) -> bool:
    """Return whether a base has the layer, in the size of the update; a fused weight counts with all its rows."""
    name, shape = own.layer.name, own.layer.shape
    found = [table[name] for table in (base.layers, base.vectors) if name in table]
    found = found or base.layers.find(own.layer.component, own.layer.original)
    if not found or not shape:
        return bool(found)
    columns = Layer("", shape).matrix_shape[1]
    return shape[0] == sum(layer.shape[0] for layer in found) and columns == found[0].matrix_shape[1]
