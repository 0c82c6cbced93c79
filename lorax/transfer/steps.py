"""Which update goes where by which method: told from names and sizes, no weight is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..adapters import Adapter, AdapterLayer, LoraXLayer, VectorLayer
from ..compare.matching import Assignment
from ..models.base import Base
from ..models.layers import Layer, Rows
from ..options import Dora, Format, Method, TransferOptions
from .methods import METHODS, Needs, TransferMethod
from .notes import Code, Note
from .report import Outcome, Row
from .widened import shared_channels


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done with an update for one layer of the target.

    Attributes:
        update: The update, as the adapter has it.
        row: Its row in the report as far as it is known. Of an outcome other than `transferred` it is final, but for
            norms.
        method: How it moves; None where it does not.
        sources: The layer of the source, or all parts of a fused weight that is moved as one.
        targets: The same of the target.
        rows: The rows of a fused update, which its kind cannot cut, that are moved; None takes all.
        channels: How many input channels the two layers share, where one has more than the other; else 0.
    """

    update: AdapterLayer
    row: Row
    method: TransferMethod | None = None
    sources: list[Layer] = field(default_factory=list[Layer])
    targets: list[Layer] = field(default_factory=list[Layer])
    rows: Rows | None = None
    channels: int = 0


def steps_of(
    adapter: Adapter, source: Base, target: Base, assignment: Assignment, options: TransferOptions
) -> list[Step]:
    """Return what is to be done with each update, in the order of the source's layers.

    Args:
        adapter: The adapter, resolved on `source` (see `Adapter.resolved`).
        source: The base that it was made for.
        target: The base that it shall work on.
        assignment: Which layer feeds which (see `lorax.match_bases`).
        options: How it is moved.

    Returns:
        A step for every layer of the target that an update goes to, and for every update that goes nowhere.
    """
    fed: dict[str, list[str]] = {}
    for name in (*target.layers, *target.vectors):
        fed.setdefault(assignment.source_of(name), []).append(name)
    order = {name: i for i, name in enumerate(source.layers)}
    updates = sorted(adapter.layers.values(), key=lambda x: (order.get(x.layer.name, len(order)), x.layer.name))
    planner = _Planner(source, target, fed, assignment, options)
    return [step for update in updates for step in planner.steps(update)]


@dataclass(frozen=True, slots=True)
class _Planner:
    source: Base
    target: Base
    fed: Mapping[str, list[str]]
    assignment: Assignment
    options: TransferOptions

    def steps(self, update: AdapterLayer) -> Iterator[Step]:
        """Yield what is to be done with an update."""
        layer = update.layer
        if kept := self._kept(update):
            yield kept
        elif isinstance(update, VectorLayer):
            yield from (self._vector(update, name) for name in self._fed(layer))
        elif len(parts := self.source.layers.parts_of(layer)) > 1:
            yield from self._fused(update, parts)
        else:
            yield from (self._matrix(update, layer, name) for name in self._fed(layer))

    def _fed(self, layer: Layer) -> list[str]:
        """Return the names of the target's layers that a layer feeds; an empty one where there is none."""
        return self.fed.get(layer.name) or [""]

    def _kept(self, update: AdapterLayer) -> Step | None:
        """Return the step of a component that a base lacks: it is kept, if the target's family has it."""
        component = update.layer.component
        counterpart = {s: t for t, s in self.assignment.components.items()}.get(component, component)
        in_source = component in self.source.components
        if isinstance(update, LoraXLayer) or (in_source and counterpart in self.target.components):
            return None
        if in_source and not any(e.component == counterpart for e in self.target.family.text_encoders):
            return None
        name, note = f"{counterpart}.{update.layer.path}", Note.of(Code.NOT_IN_BOTH, component=component)
        return Step(update, Row(update.layer.name, name, Outcome.KEPT, notes=(note,)))

    def _vector(self, update: VectorLayer, name: str) -> Step:
        """Return the step of the difference of a norm or bias: it is copied onto the paired one."""
        row = Row(update.layer.name, name, Outcome.TRANSFERRED)
        if not name:
            known = update.layer.name in self.source.vectors
            return Step(update, replace(row, outcome=Outcome.NO_TARGET_LAYER if known else Outcome.NO_SOURCE_LAYER))
        layer = self.target.vectors[name]
        if layer.shape != update.layer.shape:
            note = Note.of(Code.VECTOR_SIZE, source=update.layer.shape[0], target=layer.shape[0])
            return Step(update, replace(row, outcome=Outcome.SHAPE_MISMATCH, notes=(note,)))
        copy = METHODS[Method.copy]
        return Step(update, replace(row, method=copy.name), copy, [update.layer], [layer])

    def _fused(self, update: AdapterLayer, parts: list[Layer]) -> Iterator[Step]:
        """Yield the steps of an update that its kind cannot cut, of a fused weight: copied, or made dense and cut."""
        layer, shape = update.layer, (sum(part.shape[0] for part in parts), parts[0].matrix_shape[1])
        if layer.matrix_shape != shape:
            note = Note.of(Code.ADAPTER_SIZE, adapter=str(layer.matrix_shape), source=str(shape))
            yield Step(update, Row(layer.name, "", Outcome.SHAPE_MISMATCH, notes=(note,)))
            return
        targets = [self.target.layers[names[0]] for part in parts if (names := self.fed.get(part.name))]
        is_dense = self.options.format is Format.lora_x or is_dense_dora(update, self.options)
        if self._stays() and not is_dense and self._is_whole(targets, parts):
            name = f"{targets[0].component}.{targets[0].original}"
            copy = METHODS[Method.copy]
            yield Step(update, Row(layer.name, name, Outcome.TRANSFERRED, copy.name), copy, parts, targets)
            return
        start = 0
        for part in parts:
            rows = start, start = start, start + part.shape[0]
            yield from (self._matrix(update, part, name, rows) for name in self._fed(part))

    def _stays(self) -> bool:
        """Return whether an update that cannot be cut stays what it is."""
        return self.options.method is Method.auto or METHODS[self.options.method].needs is Needs.NOTHING

    def _is_whole(self, targets: list[Layer], parts: list[Layer]) -> bool:
        """Return whether layers of the target are all parts of one weight, as large as the parts of the source."""
        whole = self.target.layers.find(targets[0].component, targets[0].original) if targets else []
        return whole == targets and [part.shape for part in parts] == [layer.shape for layer in targets]

    def _matrix(self, update: AdapterLayer, layer: Layer, name: str, rows: Rows | None = None) -> Step:
        """Return the step of the update of one layer, or of the rows of a fused one."""
        layer_s, layer_t = self.source.layers.get(layer.name), self.target.layers.get(name)
        row = Row(layer.name, name, Outcome.TRANSFERRED)
        if layer_s is None:
            return Step(update, replace(row, outcome=Outcome.NO_SOURCE_LAYER), rows=rows)
        sizes = layer_s.matrix_shape
        if layer.matrix_shape != sizes:
            note = Note.of(Code.ADAPTER_SIZE, adapter=str(layer.matrix_shape), source=str(sizes))
            return Step(update, replace(row, outcome=Outcome.SHAPE_MISMATCH, notes=(note,)), rows=rows)
        if layer_t is None:
            return Step(update, replace(row, outcome=Outcome.NO_TARGET_LAYER), None, [layer_s], rows=rows)
        channels = shared_channels(self.source, self.target, layer_s, layer_t)
        is_same = bool(channels) or sizes == layer_t.matrix_shape
        is_thin = rows is None and (update.is_thin or isinstance(update, LoraXLayer))
        method = self._method(is_thin, is_same)
        if not is_same and not method.resizes:
            target = str(layer_t.matrix_shape)
            note = Note.of(Code.NEEDS_EQUAL_SIZES, method=method.name, source=str(sizes), target=target)
            return Step(update, replace(row, outcome=Outcome.SHAPE_MISMATCH, notes=(note,)), None, [layer_s], rows=rows)
        return Step(update, replace(row, method=method.name), method, [layer_s], [layer_t], rows, channels)

    def _method(self, is_thin: bool, is_same: bool) -> TransferMethod:
        """Return the method; `auto` is what did best in docs/results.md, what was not measured there is copied."""
        if self.options.method is not Method.auto:
            return METHODS[self.options.method]
        return METHODS[Method.orthogonal if is_thin else Method.copy] if is_same else METHODS[Method.align]


def is_fast(method: TransferMethod, options: TransferOptions) -> bool:
    """Return whether a method takes subspaces of the fast kind (see `lorax.linalg.leading_subspace`)."""
    return options.fast and method.only_projects and options.format is not Format.lora_x


def is_dense_dora(update: AdapterLayer, options: TransferOptions) -> bool:
    """Return whether an update has a magnitude that is not to be kept apart."""
    return "dora_scale" in update.parts() and options.dora is Dora.dense
