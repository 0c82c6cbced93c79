"""One task of a migration, in whichever process it runs."""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

from ..adapters import load_adapter, save_adapter
from ..adapters.config import read_files
from ..compare.matching import Assignment
from ..compute.engine import Engine, or_on_cpu
from ..errors import FileError, LoraxError, OutputError, printable
from ..files.longpath import on_disk
from ..files.output import make_folder
from ..files.tensorfile import file_hash, file_state
from ..models.base import Base, open_base
from ..transfer.plan import Plan, plan_transfer
from ..transfer.run import transfer_adapter
from ..version import __version__
from .job import Task


@dataclass(frozen=True, slots=True)
class Record:
    """What became of a task: a line of the journal.

    Attributes:
        name: The adapter, as `Task.name`.
        output: The result, as `Task.output`.
        status: `done`, `kept` (it was done before, and is unchanged) or `failed`.
        error: Why it failed.
        input_hash: SHA-256 of the adapter.
        output_hash: SHA-256 of the result.
        work: Names all else that decides the result: the bases, the options, the version, the configuration beside the
            adapter.
        layers: Layers (norms and biases too) of the adapter.
        arrived: How many of them got to the target.
        retained: Share of the update's norm that is kept.
        warnings: What the report warns of.
        seconds: How long reading, moving and writing took.
    """

    name: str
    output: str
    status: str
    error: str = ""
    input_hash: str = ""
    output_hash: str = ""
    work: str = ""
    layers: int = 0
    arrived: int = 0
    retained: float | None = None
    warnings: list[str] = field(default_factory=list[str])
    seconds: list[float] = field(default_factory=list[float])


def move(
    task: Task, folder: str, previous: Record | None, engine: Engine, assignment: Assignment | None = None
) -> Record:
    """Do a task, or find that it is done.

    Args:
        task: The task.
        folder: The output folder.
        previous: What an earlier migration wrote of it.
        engine: How and where to compute.
        assignment: The pairs of blocks, where they are known already.

    Returns:
        Its record. Whatever is wrong with a file is in it and raised nowhere.
    """
    try:
        return _move(task, Path(folder), previous, engine, assignment)
    except LoraxError as error:
        return Record(task.name, task.output, "failed", str(error))
    except Exception as error:  # a job of hundreds of files goes on, and says what it did not expect
        return Record(task.name, task.output, "failed", printable(f"unexpected {type(error).__name__}: {error}"))


def _move(task: Task, folder: Path, previous: Record | None, engine: Engine, assignment: Assignment | None) -> Record:
    source, target = opened(task.source), opened(task.target)
    path, file = _inside(folder, task.output), Path(task.adapter)
    if os.path.isdir(file):
        _refuse(file)
    own = read_files(file)
    used = _state([*source.files, *target.files, *own])
    if used[: -len(own)] != (*source.state, *target.state):
        raise _changed(task)
    options = task.options
    work = [__version__, source.identity(), target.identity(), asdict(options)]
    work += [file_hash(beside) for beside in own[1:] if os.path.lexists(on_disk(beside))]
    key = hashlib.sha256(json.dumps(work).encode()).hexdigest()
    start = time.perf_counter()
    given = file_hash(file)
    if previous is not None and _is_done(previous, path, given, key):
        return replace(previous, status="kept")
    adapter = load_adapter(file, source)
    read = time.perf_counter()
    moved, report = or_on_cpu(
        lambda engine: transfer_adapter(adapter, source, target, options, assignment=assignment, engine=engine), engine
    )
    finished = time.perf_counter()
    if _state([*source.files, *target.files, *own]) != used:
        raise _changed(task)
    make_folder(path.parent)
    save_adapter(moved, path, inputs=[file])
    written = file_hash(path)
    times = [round(value, 4) for value in (read - start, finished - read, time.perf_counter() - finished)]
    share = report.retained_norm
    return Record(
        task.name,
        task.output,
        "done",
        input_hash=given,
        output_hash=written,
        work=key,
        layers=report.layers,
        arrived=report.arrived,
        retained=share if share == share else None,
        warnings=list(map(str, report.warnings)),
        seconds=times,
    )


def _state(files: Iterable[Path]) -> tuple[object, ...]:
    """Return what tells files as they are now from any other, as `Base.state` does; nothing for one that is gone."""

    def told(file: Path) -> tuple[object, ...]:
        try:
            return os.path.realpath(file), *file_state(file)
        except OSError:
            return ()

    return tuple(map(told, files))


def _changed(task: Task) -> FileError:
    fix = "let no other program write to them, then go on with --resume"
    return FileError("a base or the adapter changed during the migration", task.name, fix)


def _is_done(previous: Record, path: Path, given: str, key: str) -> bool:
    """Whether a result is what an earlier migration made of the same; a hash of nothing names no file."""
    same = previous.status != "failed" and (previous.input_hash, previous.work) == (given, key)
    return bool(same and given and previous.output_hash) and file_hash(path) == previous.output_hash


def _refuse(folder: Path) -> NoReturn:
    """Say why the adapters of a folder are not known.

    Raises:
        FileError: Always.
    """
    try:
        os.listdir(folder)
    except OSError as error:
        fix = "change its permissions, then go on with --resume"
        raise FileError("cannot read a folder", f"{folder}: {error.strerror}", fix) from error
    raise FileError("links to folders are not followed", str(folder), "migrate the folder that it leads to by itself")


def planned(task: Task, engine: Engine, assignment: Assignment | None = None) -> Plan:
    """Return the plan of a task; of weights only those are read that pairing needs.

    Args:
        task: The task.
        engine: How and where to compute.
        assignment: The pairs of blocks, where they are known already.

    Raises:
        LoraxError: The adapter or a base cannot be read, or they do not belong together.
    """
    if os.path.isdir(task.adapter):
        _refuse(Path(task.adapter))
    source, target = opened(task.source), opened(task.target)
    adapter = load_adapter(task.adapter, source)
    return plan_transfer(adapter, source, target, task.options, assignment=assignment, engine=engine)


@lru_cache(maxsize=4)
def opened(path: str) -> Base:
    """Open a base once in a process."""
    return open_base(path)


def _inside(folder: Path, output: str) -> Path:
    """Return the path of an output, after refusing one that leads out of the folder, through links too.

    Raises:
        OutputError: It does.
    """
    path = folder / output
    if not path.parent.resolve().is_relative_to(folder.resolve()) or path.is_symlink():
        raise OutputError("an output leads out of its folder", str(path), "remove the link in the output folder")
    return path
