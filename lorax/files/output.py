"""Files that are written: checked before any work is done, whole or not at all."""

import errno
import os
import re
import secrets
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..errors import OutputError
from .longpath import on_disk

WINDOWS = os.name == "nt"
# Names that Windows gives to devices, whatever follows a dot, and what none of its names may hold.
UNNAMEABLE = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?|.*[<>:\"|?*\x00-\x1f].*|.*[ .]",
    re.IGNORECASE | re.DOTALL,
)
# What a process that was killed leaves of its outputs. Short, so that every name that a disk takes can be written.
TEMPORARY = ".lorax-*.part"


def check_output(path: str | os.PathLike[str], inputs: Iterable[Path], others: Iterable[Path] = ()) -> Path:
    """Check, before any work is done, that `path` can be written, is none of `inputs` and none of `others`.

    Files are compared, not names. A symbolic link to an input counts as that input. One to anything else is allowed,
    and will be replaced itself: what it leads to is never written.

    Args:
        path: The output.
        inputs: Files that are read.
        others: What is written too.

    Returns:
        The path.

    Raises:
        OutputError: It is an input, another output, a folder or a device, its name is none, or its folder is missing or
            not writable.
    """
    out = Path(path)
    place, folder = on_disk(out), on_disk(out.parent)
    _check_name(out)
    if (found := file_id(out)) and found in map(file_id, inputs):
        raise OutputError("the output is one of the inputs", str(out), "choose another name")
    if found and not os.path.isfile(place):
        raise OutputError("the output is a folder or a device", str(out), "give a file name")
    if not os.path.isdir(folder):
        raise OutputError("the output's folder does not exist", str(out.parent), "create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError("the output's folder cannot be written", str(out.parent), "choose another folder")
    if _place(out) in map(_place, others):
        raise OutputError("two outputs are one file", str(out), "give each its own name")
    if WINDOWS and found:
        try:
            os.rename(place, place)  # refused where another program has it open, as to replace it will be
        except OSError as error:
            raise _unwritten(out, error) from error
    return out


def file_id(path: Path) -> tuple[object, ...] | None:
    """Return what tells a file that is there from every other, by whatever path or link; None where there is none."""
    try:
        found = on_disk(path).stat()
    except (OSError, ValueError):
        return None
    # Some disks number no files.
    return (found.st_dev, found.st_ino) if found.st_ino else (os.path.normcase(os.path.realpath(path)),)


def _place(path: Path) -> tuple[object, str]:
    """Return what tells an output from others, there or not: many disks take names that differ in case for one."""
    name = unicodedata.normalize("NFC", path.name).casefold()
    return file_id(path.parent) or os.path.realpath(path.parent), name


def _check_name(path: Path) -> None:
    reason = "Windows has no such names" if WINDOWS and UNNAMEABLE.fullmatch(path.name) else ""
    try:
        os.lstat(path)
    except ValueError as error:  # NUL, or half of a character
        reason = str(error)
    except OSError as error:
        reason = reason or (error.strerror if error.errno == errno.ENAMETOOLONG else "")
    if reason:
        raise OutputError("a name that no file has", f"{path}: {reason}", "choose another name")


def write_bytes(path: Path, content: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
    """Write `content` to a temporary name beside `path`, then rename: whole or not at all.

    A symbolic link at `path` is replaced; what it leads to is not touched.

    Args:
        path: The file.
        content: All of it.
        overwrite: Replace a file that is there.
        durable: Wait until it would outlive a loss of power; for what can be made again that is not worth the wait.

    Raises:
        OutputError: The disk is full, the folder cannot be written, the file is open in a program that lets no one
            replace it, or it is there and `overwrite` is False; nothing is left behind.
    """
    temporary = on_disk(path.with_name(TEMPORARY.replace("*", secrets.token_hex(4))))
    place = on_disk(path)
    try:
        with temporary.open("xb") as out:
            out.write(content)
            if durable:
                out.flush()
                os.fsync(out.fileno())
        if overwrite:
            os.replace(temporary, place)
        else:
            _name_new(temporary, place)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        with suppress(OSError):  # what could not be made cannot be removed: the reason is said already
            temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, however many.

    Raises:
        OutputError: It cannot be made.
    """
    missing: list[Path] = []
    while not os.path.isdir(on_disk(path)) and path != path.parent:
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        try:
            on_disk(folder).mkdir(exist_ok=True)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise OutputError("cannot make a folder", f"{folder}: {reason}", "choose another place") from error


def _name_new(temporary: Path, path: Path) -> None:
    """Give a whole file its name where no other file has it.

    Raises:
        OSError: Another file has it, or the disk refuses.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links, as on exFAT and on many network mounts: an empty file takes the name first
        path.open("xb").close()
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise


def _unwritten(path: Path, error: OSError) -> OutputError:
    fix = "free space or choose another folder"
    if isinstance(error, FileExistsError):
        fix = "choose another name"
    elif isinstance(error, PermissionError) and WINDOWS:
        fix = "close the program that has it open, or choose another name"
    return OutputError("cannot write the output", f"{path}: {error.strerror}", fix)
