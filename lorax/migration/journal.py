"""What a migration has done so far: a line of JSON for each finished task, in a file beside the results."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import OutputError
from ..files.output import TEMPORARY, make_folder
from ..files.tensorfile import parse_json
from .find import find
from .work import Record

JOURNAL = "lorax-migration.jsonl"


class Journal:
    """The journal of an output folder; one process at a time has it, and a dead one does not hold it.

    Attributes:
        records: The last record of each output, by output.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        """Open it, or make a new one.

        Args:
            folder: The output folder; it is made where it is missing.
            resume: Go on with the migration that is there.

        Raises:
            OutputError: Another process has it, it is there without `resume`, it is a link or a device, or it cannot be
                written.
        """
        self.path, lock = folder / JOURNAL, folder / f".{JOURNAL}.lock"
        for path in (self.path, lock):
            if os.path.lexists(path) and (
                os.path.islink(path) or not os.path.isfile(path)
            ):  # to open a pipe is to wait
                raise OutputError("the journal is a link or no file", str(path), "take it out of the output folder")
        make_folder(folder)
        self._lock = FileLock(lock, timeout=0)
        try:
            self._lock.acquire()
            if not resume and self.path.exists() and self.path.stat().st_size:  # empty: no adapter was finished
                fix = "add --resume to go on with it, or choose another folder"
                raise OutputError("the output folder holds a migration already", str(folder), fix)
            self.records = self._read()
            for left in find(folder, f"**/{TEMPORARY}")[0]:  # by a process that was killed
                left.unlink(missing_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            if self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
                self._file.write("\n")
        except BaseException as error:
            self._lock.release()
            if isinstance(error, Timeout):
                fix = "wait for it, or choose another output folder"
                raise OutputError("another process is migrating into this folder", str(folder), fix) from error
            if isinstance(error, OSError):
                raise self._unwritten(error, "choose another output folder") from error
            raise

    def add(self, record: Record) -> None:
        """Write a record; when this returns it outlives a loss of power.

        Raises:
            OutputError: The disk is full.
        """
        self.records[record.output] = record
        try:
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritten(error, "free space and go on with --resume") from error

    def close(self) -> None:
        """Let the next process have it."""
        self._file.close()
        self._lock.release()

    def _unwritten(self, error: OSError, fix: str) -> OutputError:
        return OutputError("cannot write the journal", f"{self.path}: {error.strerror}", fix)

    def _read(self) -> dict[str, Record]:
        """Read what is there; a line that was cut off, or is not ours, counts as not written."""
        records: dict[str, Record] = {}
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        for line in lines:
            try:
                record = Record(**parse_json(line))
            except (ValueError, TypeError):
                continue
            if _is_sound(record):
                records[record.output] = record
        return records


def _is_sound(record: Record) -> bool:
    """Whether each field has the type that it is written with."""
    plain = asdict(record)
    lists = {"warnings": plain.pop("warnings"), "seconds": plain.pop("seconds")}
    retained, layers, arrived = (plain.pop(name) for name in ("retained", "layers", "arrived"))
    return (
        all(isinstance(text, str) for text in plain.values())
        and all(type(count) is int for count in (layers, arrived))
        and (retained is None or type(retained) in (int, float))
        and all(isinstance(values, list) for values in lists.values())
        and all(isinstance(text, str) for text in lists["warnings"])
        and all(type(value) in (int, float) for value in lists["seconds"])
    )
