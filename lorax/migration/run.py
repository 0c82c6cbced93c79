"""Running a migration from its tasks to its summary."""

import math
import os
import unicodedata
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from ..compare.matching import Assignment
from ..compute.engine import CPU, Engine, or_on_cpu
from ..errors import LoraxError, OptionError, OutputError
from ..files.output import file_id
from ..options import Run, choice
from ..progress import Progress, silent
from ..version import __version__
from .job import Task, input_files
from .journal import JOURNAL, Journal
from .work import Record, planned


@dataclass(slots=True)
class Summary:
    """The end of a migration.

    Attributes:
        records: What became of each task, in the order of the tasks.
    """

    records: list[Record] = field(default_factory=list[Record])

    def count(self, status: str) -> int:
        """Return how many tasks have a status."""
        return sum(record.status == status for record in self.records)

    def to_json(self) -> dict[str, object]:
        """Return it as plain data."""
        return {
            "schema": "lorax-migration",
            "schema_version": 1,
            "lorax_version": __version__,
            "records": [asdict(record) for record in self.records],
        }


def migrate(
    tasks: Sequence[Task],
    output: Path,
    *,
    engine: Engine = CPU,
    run: str = "local",
    workers: int | None = None,
    gpu_share: float = 0.0,
    resume: bool = False,
    inputs: Sequence[Path] = (),
    progress: Progress = silent,
) -> Summary:
    """Move every adapter of a job.

    The same tasks and bases give byte-identical results on either engine, for any number of workers, in one go or in
    several.

    Args:
        tasks: What to do; see `plan_folder` and `plan_manifest`.
        output: The folder of the results and of the journal; it is made where it is missing.
        engine: How and where to compute.
        run: `local`: a pool of processes on this machine. `ray`: a Ray cluster, or one made for the job.
        workers: How many processes; None: one for each core, within the memory.
        gpu_share: On Ray, the share of a GPU that a task takes.
        resume: Go on with the migration that the output folder holds: what is done and unchanged is kept.
        inputs: Files that must not be replaced, beside the adapters and bases; such as a manifest.
        progress: Called with (done, total, adapter).

    Returns:
        What became of every task.

    Raises:
        OptionError: An option is unknown or out of range, or Ray is wanted and missing.
        OutputError: The output folder is in use, holds a migration without `resume`, or cannot be written; or an output
            is one of the inputs.
    """
    run = choice(Run, run)
    if workers is not None and workers < 1:
        raise OptionError("too few workers", str(workers), "give a number from 1")
    if not 0 <= gpu_share < math.inf:
        raise OptionError("a share of a GPU is a number from 0", str(gpu_share), "give for example 0.25")
    if run is Run.ray and find_spec("ray") is None:
        fix = "pip install ray, or choose the engine local"
        raise OptionError("the engine ray needs Ray", "it is not installed", fix)
    _check_outputs(output_files(tasks, output), [*input_files(tasks), *inputs])
    journal = Journal(output, resume=resume)
    try:
        found: dict[str, Record] = {}
        twins = {} if _tells_case(output) else _twins(tasks)
        alone = [task for task in tasks if task.output not in twins]
        with closing(_records(run, alone, output, journal, workers, engine, gpu_share)) as records:
            for record in chain(twins.values(), records):
                if record.status != "kept":
                    journal.add(record)
                found[record.output] = record
                progress(len(found), len(tasks), record.name)
    finally:
        journal.close()
    return Summary([found[task.output] for task in tasks])


def dry_run(
    tasks: Sequence[Task], *, engine: Engine = CPU, progress: Progress = silent
) -> Generator[tuple[Task, str, bool]]:
    """Yield for every task what it would do, in a line, and whether it can be done; nothing is written.

    Args:
        tasks: What to do; see `plan_folder` and `plan_manifest`.
        engine: How and where to compare the bases, once for each pair of them.
        progress: Called with (done, total, adapter).
    """
    known: dict[tuple[str, str, str], Assignment] = {}
    for done, task in enumerate(tasks, 1):
        pair = task.source, task.target, task.options.matching
        try:
            plan = or_on_cpu(partial(planned, task, assignment=known.get(pair)), engine)
            known[pair] = plan.assignment
            yield task, plan.summary, True
        except LoraxError as error:
            yield task, str(error), False
        progress(done, len(tasks), task.name)


def output_files(tasks: Sequence[Task], output: Path) -> list[Path]:
    """Return the files that a migration to a folder writes: the journal and the results."""
    return [output / JOURNAL, *(output / task.output for task in tasks)]


def _check_outputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """As `lorax.files.output.check_output` for many files, whose folders need not be there."""
    kept = set(map(file_id, inputs)) - {None}
    for path in outputs:
        if file_id(path) in kept:
            raise OutputError("an output is one of the inputs", str(path), "choose another output folder")


def _tells_case(folder: Path) -> bool:
    """Whether the disk of an output folder, which has its journal, takes `a` and `A` for two names."""
    path, other = folder / JOURNAL, folder / JOURNAL.upper()
    return not os.path.exists(other) or not path.samefile(other)


def _twins(tasks: Sequence[Task]) -> dict[str, Record]:
    """Return the records of the tasks whose results would replace those of others on a disk that does not tell case."""
    first: dict[str, str] = {}
    twins: dict[str, Record] = {}
    for task in tasks:
        # Such a disk takes an accent as a character of its own and in one with its letter for the same, too.
        other = first.setdefault(unicodedata.normalize("NFC", task.output).lower(), task.output)
        if other != task.output:
            got = f"{task.output} and {other}"
            error = OutputError("two results have one name on this disk", got, "rename one of the adapters")
            twins[task.output] = Record(task.name, task.output, "failed", str(error))
    return twins


def _records(
    run: Run,
    tasks: Sequence[Task],
    output: Path,
    journal: Journal,
    workers: int | None,
    engine: Engine,
    gpu_share: float,
) -> Generator[Record]:
    if run is Run.ray:
        from .cluster import run_ray

        return run_ray(tasks, output, journal.records, workers, engine, gpu_share)
    from .local import fitting_workers, run_local

    return run_local(tasks, output, journal.records, fitting_workers(tasks, workers), engine)
