"""Moving the update of one layer to the layers of the target that it feeds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapters import AdapterLayer, DiffLayer, LoraLayer, LoraXLayer, VectorLayer, expand
from ..adapters.layer import beyond, with_magnitude, without_magnitude
from ..compare.scores import Score
from ..compare.similarity import pair_scores, score_layers
from ..compute.engine import Engine
from ..linalg import Subspace, recompress
from ..models.base import Base
from ..models.layers import Layer
from . import methods
from .notes import Code, Note
from .report import Outcome, Row
from .widened import cut, first_channels, shared_channels, widen

Move = tuple[Row, AdapterLayer | None]
Notes = tuple[Note, ...]


@dataclass(frozen=True, slots=True)
class Mover:
    """What holds for every layer of a transfer; the options are those of `transfer_adapter`.

    Attributes:
        source: The base that the adapter was made for.
        target: The base that it shall work on.
        targets: Source layer (or norm, or bias) -> the target's that it feeds.
        scores: Similarity of layer pairs that were compared already.
    """

    source: Base
    target: Base
    targets: Mapping[str, list[str]]
    scores: Sequence[Mapping[tuple[str, str], tuple[Score, Score]]]
    method: str
    rank: int
    lora_rank: int
    threshold: float
    dora: str
    lora_x: bool
    dtype: torch.dtype | None
    engine: Engine

    def move(self, own: AdapterLayer) -> Iterator[Move]:
        """Yield what becomes of one layer of an adapter: a row for each place where it arrives or does not."""
        name = own.layer.name
        if isinstance(own, VectorLayer):
            yield from (self._vector(own, place) for place in self.targets.get(name) or [""])
            return
        parts = self.source.layers.find(own.layer.component, own.layer.original) if own.layer.original else []
        if name not in self.source.layers and len(parts) > 1:
            yield from self._whole(own, parts)
        else:
            yield from (self._layer(own, place) for place in self.targets.get(name) or [""])

    def _vector(self, own: VectorLayer, place: str) -> Move:
        """Copy the difference of a norm or bias onto the paired one."""
        row = Row(own.layer.name, place, Outcome.TRANSFERRED, source_norm=own.norm())
        if not place:
            known = own.layer.name in self.source.vectors
            return replace(row, outcome=Outcome.NO_TARGET_LAYER if known else Outcome.NO_SOURCE_LAYER), None
        layer = self.target.vectors[place]
        if layer.shape != own.layer.shape:
            note = Note.of(Code.VECTOR_SIZE, source=own.layer.shape[0], target=layer.shape[0])
            return replace(row, outcome=Outcome.SHAPE_MISMATCH, notes=(note,)), None
        return replace(row, method="copy", target_norm=row.source_norm), own.moved(layer, self.dtype)

    def _whole(self, own: AdapterLayer, parts: list[Layer]) -> Iterator[Move]:
        """Move an update that its kind cannot cut, of a fused weight: copied, or made dense and then cut."""
        scale = own.parts().get("dora_scale")
        stays = self.method in ("auto", "copy") and not self.lora_x and (scale is None or self.dora != "dense")
        weight = torch.cat([self.engine.weight(self.source, part.name) for part in parts])
        places = [self.target.layers[found[0]] for part in parts if (found := self.targets.get(part.name))]
        if own.layer.matrix_shape != tuple(weight.shape):
            note = Note.of(Code.ADAPTER_SIZE, adapter=str(own.layer.matrix_shape), source=str(tuple(weight.shape)))
            yield Row(own.layer.name, "", Outcome.SHAPE_MISMATCH, notes=(note,)), None
        elif stays and self._alike(parts, places):
            layer = Layer(f"{places[0].component}.{places[0].original}", own.layer.shape, places[0].original)
            weight_t = torch.cat([self.engine.weight(self.target, place.name) for place in places])
            left, right = pair_scores(weight, weight_t)
            row = Row(own.layer.name, layer.name, Outcome.TRANSFERRED, "copy", 0, left, right, own.norm(weight))
            if row.corrected <= self.threshold:
                yield replace(row, outcome=Outcome.BELOW_THRESHOLD, method=""), None
            else:
                moved = own.moved(layer, self.dtype)
                if scale is not None:
                    moved = with_magnitude(moved, own.magnitude_on(weight, weight_t))
                moved.check_finite()
                yield replace(row, target_norm=moved.norm(weight_t)), moved
        else:
            pieces = own.delta_weight(weight).cpu().split([part.shape[0] for part in parts])
            for part, piece in zip(parts, pieces, strict=True):
                yield from self.move(DiffLayer(part, piece.reshape(part.shape)))

    def _alike(self, parts: list[Layer], places: list[Layer]) -> bool:
        """Return whether the places are all parts of one weight, as large as the parts of the source."""
        whole = self.target.layers.find(places[0].component, places[0].original) if places else []
        return whole == places and [part.shape for part in parts] == [place.shape for place in places]

    def _layer(self, own: AdapterLayer, place: str) -> Move:
        """Compare the two weights of a pair, and move the update."""
        layer_s, layer_t = self.source.layers.get(own.layer.name), self.target.layers.get(place)
        row = Row(own.layer.name, place, Outcome.TRANSFERRED)
        fits = layer_s is not None and own.layer.matrix_shape == layer_s.matrix_shape
        if fits or not own.norm_needs_weight:
            row = replace(row, source_norm=self._norm(own, self.source))
        if layer_s is None:
            return replace(row, outcome=Outcome.NO_SOURCE_LAYER), None
        if not fits:
            note = Note.of(Code.ADAPTER_SIZE, adapter=str(own.layer.matrix_shape), source=str(layer_s.matrix_shape))
            return replace(row, outcome=Outcome.SHAPE_MISMATCH, notes=(note,)), None
        if layer_t is None:
            return replace(row, outcome=Outcome.NO_TARGET_LAYER), None
        if channels := shared_channels(self.source, self.target, layer_s, layer_t):
            return self._some_channels(own, row, layer_s, layer_t, channels)
        sizes, sizes_t = layer_s.matrix_shape, layer_t.matrix_shape
        method = self.method if self.method != "auto" else _auto(own, same=sizes == sizes_t)
        if sizes != sizes_t and method not in ("align", "index"):
            note = Note.of(Code.NEEDS_EQUAL_SIZES, method=method, source=str(sizes), target=str(sizes_t))
            return replace(row, outcome=Outcome.SHAPE_MISMATCH, notes=(note,)), None
        left, right = self._scores(layer_s, layer_t)
        row = replace(row, method=method, left=left, right=right)
        if row.corrected <= self.threshold:
            return replace(row, outcome=Outcome.BELOW_THRESHOLD), None
        scale = own.parts().get("dora_scale")
        if scale is None or self.dora == "dense" or self.lora_x or sizes != sizes_t:
            result, rank, notes = self._finite(own, method, layer_s, layer_t)
        else:
            result, rank, notes = self._finite(without_magnitude(own), method, layer_s, layer_t)
            weights = self.engine.weight(self.source, layer_s.name), self.engine.weight(self.target, place)
            result = with_magnitude(result, own.magnitude_on(*weights))
            result.check_finite()
        return replace(row, rank=rank, target_norm=self._norm(result, self.target), notes=notes), result

    def _some_channels(self, own: AdapterLayer, row: Row, layer_s: Layer, layer_t: Layer, channels: int) -> Move:
        """Move the update of an input layer as if both models read only the channels that they share."""
        source, target = (
            first_channels(base, layer, channels) for base, layer in ((self.source, layer_s), (self.target, layer_t))
        )
        dtype = self.dtype or own.computed_dtype
        shared = replace(self, source=source, target=target, scores=(), lora_x=False, dtype=dtype)
        moved, result = shared._layer(cut(own, self.source, channels, self.engine), layer_t.name)
        note = Note.of(Code.FIRST_CHANNELS, channels=channels, source=layer_s.shape[1], target=layer_t.shape[1])
        moved = replace(moved, source_norm=row.source_norm, notes=(note, *moved.notes))
        if result is None:
            return moved, None
        result = widen(result, layer_t)
        if self.lora_x:
            space = self.engine.triplets(self.target, layer_t.name, self.rank)
            delta = space.singular_change(*expand(result, self.target, self.engine)).cpu()
            result = LoraXLayer(layer_t, delta, self.target.fingerprint(layer_t.name))
            moved = replace(moved, rank=space.rank, target_norm=result.norm())
        return moved, result

    def _scores(self, layer_s: Layer, layer_t: Layer) -> tuple[Score, Score]:
        pair = layer_s.name, layer_t.name
        if known := next((scores[pair] for scores in self.scores if pair in scores), None):
            return known
        left, right = score_layers(self.source, self.target, [layer_s], [layer_t], engine=self.engine)
        return left[0, 0], right[0, 0]

    def _norm(self, own: AdapterLayer, base: Base) -> float:
        return own.norm(self.engine.weight(base, own.layer.name) if own.norm_needs_weight else None)

    def _finite(
        self, own: AdapterLayer, method: str, layer_s: Layer, layer_t: Layer
    ) -> tuple[AdapterLayer, int, Notes]:
        """Return what `_moved` does.

        Raises:
            NumericsError: The numbers of the update are so large that the result, or what is decomposed on the way
                to it, is not finite.
        """
        try:
            moved = self._moved(own, method, layer_s, layer_t)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise beyond(f"{own.layer.name}, by {method}") from error
        moved[0].check_finite()
        return moved

    def _moved(self, own: AdapterLayer, method: str, layer_s: Layer, layer_t: Layer) -> tuple[AdapterLayer, int, Notes]:
        """Return the update on the target, the rank of the subspaces that were used, and what else to know."""
        as_it_is = not isinstance(own, LoraXLayer) and "dora_scale" not in own.parts()
        if method == "copy" and as_it_is and not self.lora_x:
            return own.moved(layer_t, self.dtype), 0, ()
        B, A = expand(own, self.source, self.engine)
        notes, rank = (), 0
        if method == "orthogonal":
            weights = self.engine.weight(self.source, layer_s.name), self.engine.weight(self.target, layer_t.name)
            B, A = methods.orthogonal(B, A, *weights)
        if method in _APPLY or self.lora_x:
            projects = method in ("project", "subspace-null") and not self.lora_x
            space = self.engine.subspace if projects else self.engine.triplets
            space_t = space(self.target, layer_t.name, self.rank)
            rank = space_t.rank
            if method in _APPLY:
                space_s = space(self.source, layer_s.name, self.rank) if method != "project" else space_t
                B, A = _APPLY[method](B, A, space_s, space_t)
                notes = _notes(layer_s, layer_t, space_t)
            if self.lora_x:
                delta = space_t.singular_change(B, A).cpu()
                return LoraXLayer(layer_t, delta, self.target.fingerprint(layer_t.name)), rank, notes
        if not own.is_thin and not isinstance(own, LoraXLayer) and B.shape[1] > self.lora_rank:
            B, A = recompress(B, A, self.lora_rank)
            notes = (*notes, Note.of(Code.MADE_LORA, kind=own.kind, rank=self.lora_rank))
        return LoraLayer.of(layer_t, B, A, self.dtype or own.computed_dtype, own), rank, notes


def _auto(own: AdapterLayer, *, same: bool) -> str:
    """Return the method that did best in docs/results.md; what was not measured there is copied."""
    if not same:
        return "align"
    return "orthogonal" if own.is_thin or isinstance(own, LoraXLayer) else "copy"


def _notes(source: Layer, target: Layer, space: Subspace) -> Notes:
    (m, n), (m_t, n_t) = source.matrix_shape, target.matrix_shape
    if m != m_t and n != n_t:
        return (Note(Code.BOTH_RESIZED),)
    codes = {(True, False): Code.WHOLE_OUTPUT, (False, True): Code.WHOLE_INPUT, (True, True): Code.WHOLE_BOTH}
    code = codes.get((space.rank == m_t, space.rank == n_t))
    return (Note(code),) if code else ()


_APPLY: dict[str, Callable[[Tensor, Tensor, Subspace, Subspace], methods.Factors]] = {
    "project": lambda B, A, s, t: methods.project(B, A, t),
    "index": methods.index,
    "align": methods.align,
    "subspace-null": methods.subspace_null,
}
