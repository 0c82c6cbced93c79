"""What a migration is to do, as plain data: one task for each adapter and target."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, cast

from ..adapters.config import read_files
from ..errors import FileError, FormatError, LoraxError, OptionError
from ..files import toml
from ..models.base import open_base
from ..options import DEFAULTS, TransferOptions
from .find import find

MANIFEST = 'a [[move]] has adapters = "pattern", source = "file", target = "file", and options of a transfer'


@dataclass(frozen=True, slots=True)
class Task:
    """One adapter to be moved.

    The planned ones have absolute paths: a process of a cluster runs in another folder.

    Attributes:
        adapter: The file to read.
        name: What reports call it: its path below the folder of the job.
        output: Where the result goes, below the output folder; no two tasks of a job share it.
        source: The base that it was made for, a file or folder.
        target: The base that it shall work on.
        options: How it is moved.
    """

    adapter: str
    name: str
    output: str
    source: str
    target: str
    options: TransferOptions = DEFAULTS


def plan_folder(
    folder: Path, source: Path, target: Path, options: TransferOptions, without: Path | None = None
) -> list[Task]:
    """Return a task for every safetensors file below a folder, in the order of their names.

    What cannot be looked into has a task too, which will fail: a folder that cannot be read, a link to a folder
    elsewhere (none is followed).

    Args:
        folder: Where the adapters are.
        source: The base that they were made for.
        target: The base that they shall work on.
        options: How they are moved.
        without: A folder (of outputs) whose files are not adapters to move.

    Raises:
        FileError: The folder cannot be read.
        FormatError: There is none.
    """
    apart = {_real(path) for path in (source, target, without) if path}
    found = _below(folder, "**/*", apart)
    if not found:
        raise FormatError("no adapter to migrate", f"no safetensors file below {folder}", "give another folder")
    return _named([_task(folder, file, source, target, options) for file in found])


def plan_manifest(manifest: Path, folder: Path, options: TransferOptions, without: Path | None = None) -> list[Task]:
    """Return the tasks that a manifest describes: TOML, a list of `[[move]]`.

    A move has `adapters`, a file or a pattern below the folder; `source` and `target`, relative to the manifest; and
    options of a transfer by their names, for those that differ from `options`. No base of any move is an adapter. What
    a pattern cannot look into has a task as in `plan_folder`.

    Raises:
        FileError: The folder cannot be read.
        FormatError: It is no manifest, or a pattern finds nothing.
        OptionError: A move has an option that does not exist or is of the wrong type.
    """
    apart = {_real(without)} if without else set[Path]()
    planned: list[tuple[str, str, Path, Path, TransferOptions]] = []
    for number, move in enumerate(_moves(manifest), 1):
        place = f"{manifest}, move {number}"
        given: dict[str, Any] = dict(cast("dict[str, Any]", move)) if isinstance(move, dict) else {}
        paths = [given.pop(key, None) for key in ("adapters", "source", "target")]
        if not all(isinstance(path, str) and path for path in paths):
            raise FormatError("not a manifest", f"{place} lacks adapters, source or target", MANIFEST)
        pattern, source, target = str(paths[0]), *(manifest.parent / str(path) for path in paths[1:])
        if PurePath(pattern).anchor or ".." in PurePath(pattern).parts:
            raise FormatError("a pattern leads out of the folder", f"{place}: {pattern}", "give one below the folder")
        try:
            apart |= {_real(source), _real(target)}
        except (ValueError, OSError) as error:
            raise FormatError("a path that cannot be a file's", f"{place}: {error}", MANIFEST) from error
        try:
            planned.append((place, pattern, source, target, options.changed(given)))
        except OptionError as error:
            raise OptionError(error.what, f"{place}: {error.got}", error.fix) from error
    tasks: list[Task] = []
    for place, pattern, source, target, changed in planned:
        try:
            found = _below(folder, pattern, apart)
        except (ValueError, OSError) as error:
            raise FormatError("a pattern that cannot be a file's", f"{place}: {error}", MANIFEST) from error
        if not found:
            fix = "check the pattern; in one, [[] stands for ["
            raise FormatError("a pattern finds no adapter", f"{place}: {pattern} below {folder}", fix)
        tasks += [_task(folder, file, source, target, changed) for file in found]
    return _named(tasks)


def _moves(manifest: Path) -> list[Any]:
    try:
        if os.path.exists(manifest) and not os.path.isfile(manifest):  # to open a pipe is to wait
            raise ValueError("no ordinary file")
        moves: Any = toml.loads(manifest.read_text(encoding="utf-8-sig")).get("move")
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError("not a manifest", f"{manifest}: {error}", MANIFEST) from error
    if not isinstance(moves, list) or not moves:
        raise FormatError("not a manifest", f"{manifest} has no [[move]]", MANIFEST)
    return cast("list[Any]", moves)


def input_files(tasks: Sequence[Task]) -> list[Path]:
    """Return the files that tasks read, which no output may replace."""
    bases = {base for task in tasks for base in (task.source, task.target)}
    adapters = [file for task in tasks for file in read_files(Path(task.adapter))]
    return adapters + [file for base in bases for file in _base_files(Path(base))]


def _base_files(base: Path) -> list[Path]:
    try:
        return open_base(base).files
    except LoraxError:  # it will be said of each task; what it consists of is not known
        return [base, *find(base, "**/*.safetensors")[0]]


def _below(folder: Path, pattern: str, apart: set[Path]) -> list[Path]:
    """Return the safetensors files that a pattern finds, and the folders that it cannot look into.

    Raises:
        FileError: The folder itself cannot be read.
        ValueError: The pattern is none.
    """
    found, unread = find(folder, pattern)
    if folder in unread:
        raise FileError("cannot read the folder of the adapters", str(folder), "check the path and its permissions")
    files = [file for file in found if file.suffix.lower() == ".safetensors"] + unread
    return sorted(file for file in files if apart.isdisjoint([(real := _real(file)), *real.parents]))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises where links lead in a circle


def _task(folder: Path, file: Path, source: Path, target: Path, options: TransferOptions) -> Task:
    name = file.relative_to(folder).as_posix()
    return Task(str(file.absolute()), name, name, str(source.absolute()), str(target.absolute()), options)


def _named(tasks: Iterable[Task]) -> list[Task]:
    """Give each task an output of its own: an adapter that goes to several targets gets their names."""
    tasks = list(dict.fromkeys(tasks))
    often = Counter(task.name for task in tasks)
    named = [task if often[task.name] == 1 else replace(task, output=_with_target(task)) for task in tasks]
    for output, count in Counter(task.output for task in named).items():
        if count > 1:
            fix = "let each adapter go to a target once; make a second migration for other options"
            raise OptionError("two moves of the manifest give one output", output, fix)
    return named


def _with_target(task: Task) -> str:
    path = PurePath(task.name)
    return path.with_name(f"{path.stem}.{PurePath(task.target).stem}{path.suffix}").as_posix()
