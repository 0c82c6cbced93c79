"""What the command line prints and draws."""

import io
import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from .errors import printable
from .models.layers import Layer
from .progress import Progress, silent

if TYPE_CHECKING:
    from .compare.similarity import Similarity
    from .migration import Summary
    from .transfer.plan import Plan
    from .transfer.report import TransferReport

# What is printed comes from files: no markup and no emoji is read in it.
say = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
tell = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Tell what to know."""
    _tell("warning", "yellow", text)


def fail(text: str, what: str = "error") -> None:
    """Tell what went wrong, in one line."""
    _tell(what, "red", text)


def _tell(what: str, style: str, text: str) -> None:
    tell.print(Text.assemble((what, style), f": {text}"))


def print_similarity(result: "Similarity") -> None:
    """Print the means of each kind of layer, over the layers of equal name."""
    table = Table("kind", "pairs", "left", "right", "corrected", "chance", box=None, title="layers of equal name")
    for kind in result.kinds:
        pairs = kind.equal_names()
        scores = [score for pair in pairs for score in pair]
        cells = [
            [left.phi for left, _ in pairs],
            [right.phi for _, right in pairs],
            [score.corrected for score in scores],
            [score.chance for score in scores],
        ]
        table.add_row(printable(kind.kind), str(len(pairs)), *(_mean(values) for values in cells))
    say.print(table)


def print_report(report: "TransferReport") -> None:
    """Print what a transfer did, by kind of layer, and what to know and do."""
    from .transfer.report import Outcome

    table = Table("kind of layer", "layers", "arrived", "similarity", "norm kept", box=None)
    kinds: dict[str, list[Any]] = {}
    missing = {row.source for row in report.missing}
    for row in report.rows:
        layer = Layer(row.source, ())
        kinds.setdefault(f"{layer.component}:{layer.kind}", []).append(row)
    for kind, rows in kinds.items():
        layers = {row.source for row in rows}
        similar, kept = _mean([row.corrected for row in rows]), _mean([row.retained_norm for row in rows])
        table.add_row(printable(kind), str(len(layers)), str(len(layers - missing)), similar, kept)
    say.print(table)
    for line in report.assignment.summary:
        say.print(line)
    say.print(report.summary)
    for row in report.rows:
        if row.outcome is Outcome.KEPT:
            component = row.source.partition(".")[0]
            say.print(f"kept unchanged: {component} layers, {printable(row.note)}")
            break
    for warning in report.warnings:
        warn(printable(str(warning)))


def print_migration(summary: "Summary") -> None:
    """Print what became of a library of adapters: the failed ones by name, the others as numbers."""
    counts = {status: summary.count(status) for status in ("done", "kept", "failed")}
    seconds = [record.seconds for record in summary.records if record.status == "done"]
    weak = [record for record in summary.records if record.warnings]
    for record in summary.records:
        if record.status == "failed":
            fail(f"{printable(record.name)}: {printable(record.error)}", "failed")
    say.print(", ".join(f"{count} {status}" for status, count in counts.items()) + f" of {len(summary.records)}")
    if seconds:
        shares = [sum(part) / max(sum(map(sum, seconds)), 1e-9) for part in zip(*seconds, strict=True)]
        words = zip(("reading", "moving", "writing"), shares, strict=True)
        say.print(", ".join(f"{name} {share:.0%}" for name, share in words) + " of the time")
    if weak:
        warn(f"{len(weak)} with a warning, such as {printable(weak[0].name)}:")
        tell.print(printable(weak[0].warnings[0]))


def print_plan(plan: "Plan") -> None:
    """Print what a transfer would do: a line for every step, then their count."""
    for row in (step.row for step in plan.steps):
        said = ", ".join(filter(None, (row.method or row.outcome, row.note)))
        say.print(printable(f"{row.source} -> {row.target or 'nowhere'}: {said}"), soft_wrap=True)
    for line in (*plan.assignment.summary, plan.summary):
        say.print(line)


def _mean(values: list[float]) -> str:
    from .compare.scores import finite_mean

    mean = finite_mean(values)
    return "-" if math.isnan(mean) else f"{mean:.3f}"


def plain(value: Any) -> str:
    """Return a value in the words of a table, safe for the terminal."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        value = [f"{key}: {entry}" for key, entry in cast("dict[Any, Any]", value).items()]
    if isinstance(value, list):
        value = ", ".join(map(str, cast("list[Any]", value)))
    return printable(f"{value:.4g}" if isinstance(value, float) else str(value))


def png(result: "Similarity | TransferReport") -> bytes:
    """Return a result as a picture: a similarity as heat maps, a report as what each layer kept."""
    from .show import pictures
    from .transfer.report import TransferReport

    is_report = isinstance(result, TransferReport)
    image = pictures.retained_picture(result) if is_report else pictures.similarity_picture(result)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def bar(what: str) -> Generator[Progress]:
    """Show progress while the block runs, where there is a terminal; yields what `progress` arguments take."""
    if not tell.is_terminal:
        yield silent
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=tell, transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total, _: shown.update(task, completed=done, total=total)
