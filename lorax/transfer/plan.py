"""The plan of a transfer: what goes where by which method, and what that needs."""

from collections import Counter
from dataclasses import dataclass

from ..adapters import Adapter, AdapterLayer, LoraXLayer, VectorLayer
from ..checks import check_rank
from ..compare.matching import Assignment, match_bases
from ..compare.scores import Scores
from ..compare.similarity import Similarity
from ..compute.engine import CPU, Engine
from ..errors import MismatchError
from ..models.base import Base
from ..models.layers import Layer
from ..options import DEFAULTS, Format, TransferOptions
from ..progress import Progress, silent
from .methods import Needs
from .notes import Code, Note, counted
from .report import ARRIVED, Outcome, Row, TransferReport
from .steps import Step, is_fast, steps_of


@dataclass(frozen=True, slots=True)
class Piece:
    """A decomposition that a transfer needs.

    Attributes:
        of_target: Whether it is of a layer of the target, not of the source.
        layer: The name of the layer.
        rank: How many singular triplets.
        fast: Whether the subspace is enough (see `lorax.linalg.leading_subspace`).
    """

    of_target: bool
    layer: str
    rank: int
    fast: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What a transfer will do, in the order of the source's layers.

    Attributes:
        adapter: The adapter, named as its source names it.
        source: The base that it was made for.
        target: The base that it shall work on.
        assignment: Which layer feeds which.
        options: How it is moved.
        steps: What is to be done.
        scores: What is known of the two bases; what is computed is added.
    """

    adapter: Adapter
    source: Base
    target: Base
    assignment: Assignment
    options: TransferOptions
    steps: list[Step]
    scores: Scores

    @property
    def summary(self) -> str:
        """How many layers of the file would be moved by which method, and how many not for which reason."""
        report = self.report([step.row for step in self.steps])
        ways = Counter(str(row.method or row.outcome) for row in report.rows if row.outcome in ARRIVED)
        why = Counter(str(row.outcome) for row in report.rows if row.outcome not in ARRIVED)
        said = [f"{report.arrived} of {report.layers} layers would be moved", counted(ways), counted(why)]
        return "; ".join(filter(None, said))

    def report(self, rows: list[Row]) -> TransferReport:
        """Return the report of the transfer: these rows, and one for each layer that could not be read."""
        adapter, options = self.adapter, self.options
        unread = [
            Row(name, "", Outcome.UNREAD, notes=(Note.of(Code.UNREAD, why=why),))
            for name, why in adapter.unread.items()
        ]
        return TransferReport(
            adapter.name,
            self.source.name,
            self.target.name,
            options.method,
            options.subspace_rank,
            options.threshold,
            self.assignment,
            [*rows, *unread],
            dict(adapter.unused),
        )

    def pieces(self, step: Step) -> list[Piece]:
        """Return the decompositions of whole layers that a step needs, if its layers are similar enough to move it."""
        method, update = step.method, step.update
        if method is None or step.channels or len(step.sources) != 1 or isinstance(update, VectorLayer):
            return []
        source, target = step.sources[0].name, step.targets[0].name
        is_lora_x, fast = self.options.format is Format.lora_x, is_fast(method, self.options)
        found: list[Piece] = []
        if isinstance(update, LoraXLayer):
            found.append(Piece(False, source, update.rank, False))
        if method.needs in (Needs.TARGET, Needs.BOTH) or is_lora_x:
            found.append(Piece(True, target, self.options.subspace_rank, fast))
        if method.needs is Needs.BOTH:
            found.append(Piece(False, source, self.options.subspace_rank, fast))
        return found


def plan_transfer(
    adapter: Adapter,
    source: Base,
    target: Base,
    options: TransferOptions = DEFAULTS,
    *,
    assignment: Assignment | None = None,
    similarity: Similarity | None = None,
    engine: Engine = CPU,
    progress: Progress = silent,
) -> Plan:
    """Plan a transfer; weights are read only where the blocks are paired by similarity.

    Args:
        adapter: The adapter, made for `source`.
        source: The base that it was made for.
        target: The base that it shall work on.
        options: How it is moved.
        assignment: The pairs, where they are known already; `options.matching` is then not used.
        similarity: A comparison of these two bases; its scores are used instead of comparing the layers again.
        engine: How and where to compute.
        progress: Called with (done, total, layer name); an exception that it raises stops the work.

    Returns:
        The plan, to be looked at and given to `lorax.run_plan`.

    Raises:
        OptionError: The rank is above that of every layer.
        MismatchError: The adapter does not belong to the source, or the similarity is of other bases.
        NumericsError: A weight holds NaN or Inf.
    """
    check_rank(options.rank, [*source.layers.values(), *target.layers.values()])
    adapter = adapter.resolved(source)
    _check_belongs(adapter, source, target)
    with engine.remembering(source, target):
        known = [] if assignment is None else [assignment.scores]
        if similarity is not None:
            if similarity.identities != (source.identity(), target.identity()):
                got = f"it compared {similarity.source} and {similarity.target}"
                fix = "compare source and target of this transfer"
                raise MismatchError("the similarity is of other bases", got, fix)
            known.append(similarity.scores)
        scores = Scores(*known)
        if assignment is None:
            assignment = match_bases(
                source, target, options.matching, scores=scores, sketch=options.sketch, engine=engine, progress=progress
            )
    steps = steps_of(adapter, source, target, assignment, options)
    return Plan(adapter, source, target, assignment, options, steps, scores)


def _check_belongs(adapter: Adapter, source: Base, target: Base) -> None:
    """Refuse an adapter of the target, or no layer of which is in the source."""
    layers = [
        update
        for update in adapter.layers.values()
        if update.layer.component in source.components and update.layer.shape != ()
    ]
    layers = layers or [update for update in adapter.layers.values() if isinstance(update, LoraXLayer)]
    if not layers:
        return

    def fitting(base: Base) -> set[str]:
        return {update.layer.name for update in layers if _fits(update, base)}

    in_source, in_target = fitting(source), fitting(target)
    if not in_source:
        raise MismatchError(
            "the adapter does not belong to the source base",
            f"{adapter.name} and {source.name} ({source.label})",
            "swap source and target" if in_target else "give the base that it was made for",
        )
    if len(in_source) < len(in_target) == len(layers):
        first = next(update.layer.name for update in layers if update.layer.name not in in_source)
        got = f"{adapter.name}: {first} is in {target.name} and not in {source.name}"
        fix = "use it as it is; if source and target are swapped, swap them"
        raise MismatchError("the adapter is made for the target already", got, fix)


def _fits(update: AdapterLayer, base: Base) -> bool:
    """Return whether a base has the layer, in the size of the update; a fused weight counts with all its rows."""
    name, shape = update.layer.name, update.layer.shape
    found = [base.vectors[name]] if name in base.vectors else base.layers.parts_of(update.layer)
    if not found or not shape:
        return bool(found)
    columns = Layer("", shape).matrix_shape[1]
    return shape[0] == sum(layer.shape[0] for layer in found) and columns == found[0].matrix_shape[1]
