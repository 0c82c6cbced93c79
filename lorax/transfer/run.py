"""A transfer from plan to report: plans it, carries out the plan, and says what became of every layer."""

from dataclasses import replace

import torch

from ..adapters import Adapter, AdapterLayer
from ..compare.matching import Assignment
from ..compare.similarity import Similarity
from ..compute.engine import CPU, Engine
from ..errors import MismatchError
from ..models.base import Base
from ..options import DEFAULTS, DType, Naming, TransferOptions
from ..progress import Progress, silent
from ..version import __version__
from .move import Mover
from .notes import Code, Note, counted
from .plan import Piece, Plan, plan_transfer
from .report import Outcome, Row, TransferReport, lower


def transfer_adapter(
    adapter: Adapter,
    source: Base,
    target: Base,
    options: TransferOptions = DEFAULTS,
    *,
    assignment: Assignment | None = None,
    similarity: Similarity | None = None,
    engine: Engine = CPU,
    progress: Progress = silent,
    **changes: object,
) -> tuple[Adapter, TransferReport]:
    """Move an adapter to another base, layer by layer.

    Args:
        adapter: The adapter, made for `source`.
        source: The base that it was made for.
        target: The base that it shall work on.
        options: How it is moved.
        assignment: The pairs, where they are known already; `options.matching` is then not used.
        similarity: A comparison of these two bases; its scores are used instead of comparing the layers again.
        engine: How and where to compute.
        progress: Called with (done, total, layer name); an exception that it raises stops the work.
        changes: Options by name that count in place of those of `options`, such as `method="copy"`.

    Returns:
        The adapter for the target, with where it came from in its metadata, and a report with a row for every layer.

    Raises:
        OptionError: An option does not exist or is out of range.
        MismatchError: The adapter does not belong to the source, the similarity is of other bases, nothing can be
            transferred, or not all and `options.strict` is set.
        NumericsError: A weight holds NaN or Inf, or an update grows beyond the dtype of its result.
    """
    options = options.changed(changes)
    with engine.remembering(source, target):
        plan = plan_transfer(
            adapter, source, target, options, assignment=assignment, similarity=similarity, engine=engine,
            progress=progress,
        )  # fmt: skip
        return run_plan(plan, engine=engine, progress=progress)


def needed_pieces(plan: Plan, engine: Engine) -> list[Piece]:
    """Return the decompositions that a plan needs: for the pairs that are similar enough, which is found out."""
    mover = _mover(plan, engine)
    found: dict[Piece, None] = {}
    for step in plan.steps:
        needed = plan.pieces(step)
        if needed and lower(*mover.score(step.sources[0], step.targets[0])) > plan.options.threshold:
            found |= dict.fromkeys(needed)
    return list(found)


def run_plan(plan: Plan, *, engine: Engine = CPU, progress: Progress = silent) -> tuple[Adapter, TransferReport]:
    """Carry out a plan.

    Args:
        plan: The plan.
        engine: How and where to compute.
        progress: Called with (done, total, layer name).

    Returns:
        As `transfer_adapter`, whose errors it raises.
    """
    adapter, options, mover = plan.adapter, plan.options, _mover(plan, engine)
    rows: list[Row] = []
    moved: dict[str, AdapterLayer] = {}
    for done, step in enumerate(plan.steps, 1):
        row, result = mover.move(step)
        if result is not None and result.layer.name in moved:
            row, result = replace(row, outcome=Outcome.TWICE, notes=(Note(Code.FED_ALREADY),)), None
        rows.append(row)
        if result is not None:
            moved[result.layer.name] = result
        progress(done, len(plan.steps), step.update.layer.name)
    report = plan.report(rows)
    _check_arrived(report, strict=options.strict)
    naming = adapter.naming if options.naming is Naming.keep else str(options.naming)
    return Adapter(adapter.name, plan.target.family, naming, moved, {}, _metadata(plan)), report


def _mover(plan: Plan, engine: Engine) -> Mover:
    word = plan.options.dtype
    dtype = None if word is DType.keep else getattr(torch, word)
    return Mover(plan.source, plan.target, plan.options, dtype, plan.scores, engine)


def _metadata(plan: Plan) -> dict[str, str]:
    """Return what a result says of where it came from."""
    return {
        **plan.adapter.metadata,
        "lorax_version": __version__,
        "lorax_source": plan.source.name,
        "lorax_source_identity": plan.source.identity(),
        "lorax_target": plan.target.name,
        "lorax_target_identity": plan.target.identity(),
        "lorax_method": str(plan.options.method),
        "lorax_rank": str(plan.options.subspace_rank),
        "lorax_threshold": f"{plan.options.threshold:g}",
        "lorax_matching": plan.assignment.matching,
    }


def _check_arrived(report: TransferReport, *, strict: bool) -> None:
    if not report.arrived:
        why = counted(report.outcomes)
        raise MismatchError("no layer of the adapter can be transferred", why, "check source, target and threshold")
    if strict and report.missing:
        row = report.missing[0]
        got = f"{len(report.missing)} of {report.layers}, the first {row.source} ({row.outcome})"
        raise MismatchError("strict: layers get no update", got, "drop --strict to go on without them")
