"""Doing a step of a plan: compare the two layers, move the update, fill in the row."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..adapters import AdapterLayer, DiffLayer, LoraLayer, LoraXLayer, VectorLayer, expand
from ..adapters.layer import beyond, with_magnitude, without_magnitude
from ..compare.scores import Score, Scores
from ..compare.similarity import pair_scores, score_layers
from ..compute.engine import Engine
from ..linalg import Subspace, recompress
from ..models.base import Base
from ..models.layers import Layer
from ..options import Format, TransferOptions
from .methods import Needs, TransferMethod
from .notes import Code, Note
from .report import Outcome, Row
from .steps import Step, is_dense_dora, is_fast
from .widened import cut, first_channels, widen

Move = tuple[Row, AdapterLayer | None]
Notes = tuple[Note, ...]


@dataclass(frozen=True, slots=True)
class Mover:
    """What holds for every step of a transfer.

    Attributes:
        source: The base that the adapter was made for.
        target: The base that it shall work on.
        options: How it is moved.
        dtype: Of the factors of the result; None takes that of the input.
        scores: What is known of the two bases.
        engine: How and where to compute.
    """

    source: Base
    target: Base
    options: TransferOptions
    dtype: torch.dtype | None
    scores: Scores
    engine: Engine
    _dense: dict[AdapterLayer, Tensor] = field(default_factory=dict[AdapterLayer, Tensor], init=False)

    def move(self, step: Step) -> Move:
        """Return the row of a step, and the update on its layer of the target; None where none arrives."""
        update, row = step.update, step.row
        if row.outcome is Outcome.KEPT:
            norm = torch.nan if update.needs_weight else update.norm()
            kept = replace(update, layer=replace(update.layer, name=row.target))
            return replace(row, source_norm=norm, target_norm=norm), kept
        if isinstance(update, VectorLayer):
            row = replace(row, source_norm=update.norm())
            if step.method is None:
                return row, None
            return replace(row, target_norm=row.source_norm), update.moved(step.targets[0], self.dtype)
        if len(step.sources) > 1:
            return self._fused(step)
        if step.rows is not None:
            update = self._part(step, step.rows)
        if step.sources or not update.norm_needs_weight:
            row = replace(row, source_norm=self._norm(update, self.source))
        if step.method is None:
            return row, None
        done = self._some_channels if step.channels else self._layer
        return done(replace(step, update=update, row=row), step.method)

    def _part(self, step: Step, rows: tuple[int, int]) -> DiffLayer:
        """Return the rows of a fused update that its kind cannot cut, dense."""
        if step.update not in self._dense:  # its parts follow one another
            self._dense.clear()
            weight = self.source.fused_weight(step.update.layer, self.engine.device)
            self._dense[step.update] = step.update.delta_weight(weight).cpu()
        part = self.source.layers[step.row.source]
        return DiffLayer(part, self._dense[step.update][rows[0] : rows[1]].reshape(part.shape))

    def _fused(self, step: Step) -> Move:
        """Copy an update of a whole fused weight."""
        update, targets = step.update, step.targets
        weight_s, weight_t = (
            torch.cat([self.engine.weight(base, part.name) for part in parts])
            for base, parts in ((self.source, step.sources), (self.target, targets))
        )
        left, right = pair_scores(weight_s, weight_t, sketch=self.options.sketch)
        if left.is_near(self.options.threshold) or right.is_near(self.options.threshold):
            left, right = pair_scores(weight_s, weight_t)
        row = replace(step.row, left=left, right=right, source_norm=update.norm(weight_s))
        if row.corrected <= self.options.threshold:
            return replace(row, outcome=Outcome.BELOW_THRESHOLD, method=""), None
        moved = update.moved(Layer(row.target, update.layer.shape, targets[0].original), self.dtype)
        if "dora_scale" in update.parts():
            moved = with_magnitude(moved, update.magnitude_on(weight_s, weight_t))
        moved.check_finite()
        return replace(row, target_norm=moved.norm(weight_t)), moved

    def _layer(self, step: Step, method: TransferMethod) -> Move:
        """Compare the two weights of a pair, and move the update."""
        update, layer_s, layer_t = step.update, step.sources[0], step.targets[0]
        left, right = self.score(layer_s, layer_t)
        row = replace(step.row, left=left, right=right)
        if row.corrected <= self.options.threshold:
            return replace(row, outcome=Outcome.BELOW_THRESHOLD), None
        keeps = "dora_scale" in update.parts() and not is_dense_dora(update, self.options)
        if keeps and self.options.format is Format.lora and layer_s.matrix_shape == layer_t.matrix_shape:
            result, rank, notes = self._finite(without_magnitude(update), method, layer_s, layer_t)
            weights = self.engine.weight(self.source, layer_s.name), self.engine.weight(self.target, layer_t.name)
            result = with_magnitude(result, update.magnitude_on(*weights))
            result.check_finite()
        else:
            result, rank, notes = self._finite(update, method, layer_s, layer_t)
        return replace(row, rank=rank, target_norm=self._norm(result, self.target), notes=notes), result

    def _some_channels(self, step: Step, method: TransferMethod) -> Move:
        """Move the update of an input layer as if both models read only the channels that they share."""
        update, layer_s, layer_t, channels = step.update, step.sources[0], step.targets[0], step.channels
        source, target = (
            first_channels(base, layer, channels) for base, layer in ((self.source, layer_s), (self.target, layer_t))
        )
        options, dtype = replace(self.options, format=Format.lora), self.dtype or update.computed_dtype
        shared = Mover(source, target, options, dtype, Scores(), self.engine)
        part = cut(update, self.source, channels, self.engine)
        parts = [source.layers[layer_s.name]], [target.layers[layer_t.name]]
        row, result = shared._layer(Step(part, step.row, method, *parts), method)
        note = Note.of(Code.FIRST_CHANNELS, channels=channels, source=layer_s.shape[1], target=layer_t.shape[1])
        row = replace(row, notes=(note, *row.notes))
        if result is None:
            return row, None
        result = widen(result, layer_t)
        if self.options.format is Format.lora_x:
            space = self.engine.triplets(self.target, layer_t.name, self.options.subspace_rank)
            delta = space.singular_change(*expand(result, self.target, self.engine)).cpu()
            result = LoraXLayer(layer_t, delta, self.target.fingerprint(layer_t.name))
            row = replace(row, rank=space.rank, target_norm=result.norm())
        return row, result

    def score(self, layer_s: Layer, layer_t: Layer) -> tuple[Score, Score]:
        """Return the left and right similarity of two layers; what was not known is computed, and then known."""
        pair = layer_s.name, layer_t.name
        if pair not in self.scores:
            self._compare(layer_s, layer_t, self.options.sketch)
        if any(side.is_near(self.options.threshold) for side in self.scores[pair]):
            self._compare(layer_s, layer_t, None)
        return self.scores[pair]

    def _compare(self, layer_s: Layer, layer_t: Layer, sketch: int | None) -> None:
        sides = score_layers(self.source, self.target, [layer_s], [layer_t], sketch=sketch, engine=self.engine)
        self.scores.add_pair(layer_s, layer_t, (sides[0][0, 0], sides[1][0, 0]))

    def _norm(self, update: AdapterLayer, base: Base) -> float:
        return update.norm(self.engine.weight(base, update.layer.name) if update.norm_needs_weight else None)

    def _finite(
        self, update: AdapterLayer, method: TransferMethod, layer_s: Layer, layer_t: Layer
    ) -> tuple[AdapterLayer, int, Notes]:
        """Return what `_moved` does.

        Raises:
            NumericsError: The numbers of the update are so large that the result, or what is decomposed on the way
                to it, is not finite.
        """
        try:
            moved = self._moved(update, method, layer_s, layer_t)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise beyond(f"{update.layer.name}, by {method.name}") from error
        moved[0].check_finite()
        return moved

    def _moved(
        self, update: AdapterLayer, method: TransferMethod, layer_s: Layer, layer_t: Layer
    ) -> tuple[AdapterLayer, int, Notes]:
        """Return the update on the target, the rank of the subspaces that were used, and what else to know."""
        options = self.options
        lora_x = options.format is Format.lora_x
        as_it_is = not isinstance(update, LoraXLayer) and "dora_scale" not in update.parts()
        if method.needs is Needs.NOTHING and as_it_is and not lora_x:
            return update.moved(layer_t, self.dtype), 0, ()
        B, A = method.apply(
            *expand(update, self.source, self.engine), *(given := self._given(method, layer_s, layer_t))
        )
        spaces = [value for value in given if isinstance(value, Subspace)]
        notes, rank = (_notes(layer_s, layer_t, spaces[-1]), spaces[-1].rank) if spaces else ((), 0)
        if lora_x:
            space = spaces[-1] if spaces else self.engine.triplets(self.target, layer_t.name, options.subspace_rank)
            delta = space.singular_change(B, A).cpu()
            return LoraXLayer(layer_t, delta, self.target.fingerprint(layer_t.name)), space.rank, notes
        lora_rank = options.lora_rank
        if not update.is_thin and not isinstance(update, LoraXLayer) and B.shape[1] > lora_rank:
            B, A = recompress(B, A, lora_rank)
            notes = (*notes, Note.of(Code.MADE_LORA, kind=update.kind, rank=lora_rank))
        return LoraLayer.of(layer_t, B, A, self.dtype or update.computed_dtype, update), rank, notes

    def _given(self, method: TransferMethod, layer_s: Layer, layer_t: Layer) -> list[Tensor | Subspace]:
        """Return what a method needs, of the source first."""
        both = ((self.source, layer_s.name), (self.target, layer_t.name))
        if method.needs is Needs.NOTHING:
            return []
        if method.needs is Needs.WEIGHTS:
            return [self.engine.weight(base, name) for base, name in both]
        space = self.engine.subspace if is_fast(method, self.options) else self.engine.triplets
        used = both if method.needs is Needs.BOTH else both[1:]
        return [space(base, name, self.options.subspace_rank) for base, name in used]


def _notes(source: Layer, target: Layer, space: Subspace) -> Notes:
    (m, n), (m_t, n_t) = source.matrix_shape, target.matrix_shape
    if m != m_t and n != n_t:
        return (Note(Code.BOTH_RESIZED),)
    codes = {(True, False): Code.WHOLE_OUTPUT, (False, True): Code.WHOLE_INPUT, (True, True): Code.WHOLE_BOTH}
    code = codes.get((space.rank == m_t, space.rank == n_t))
    return (Note(code),) if code else ()
