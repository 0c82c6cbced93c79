"""Files that are written: checked before any work is done, whole or not at all."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from .errors import OutputError


def check_output(path: str | os.PathLike[str], inputs: list[Path]) -> Path:
    """Check, before any work is done, that `path` can be written and is none of `inputs`.

    A symbolic link to an input counts as that input. One to anything else is allowed, and will be replaced itself: what
    it leads to is never written.

    Returns:
        The path.

    Raises:
        OutputError: It is an input, a folder or a device, or its folder is missing or not writable.
    """
    out = Path(path)  # os.path takes what cannot be looked at for what is not there
    if any(os.path.exists(out) and os.path.exists(given) and out.samefile(given) for given in inputs):
        raise OutputError("the output is one of the inputs", str(out), "choose another name")
    if os.path.exists(out) and not os.path.isfile(out):
        raise OutputError("the output is a folder or a device", str(out), "give a file name")
    if not os.path.isdir(out.parent):
        raise OutputError("the output's folder does not exist", str(out.parent), "create it first")
    if not os.access(out.parent, os.W_OK):
        raise OutputError("the output's folder cannot be written", str(out.parent), "choose another folder")
    return out


def write_bytes(path: Path, content: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
    """Write `content` to a temporary name beside `path`, then rename: whole or not at all.

    A symbolic link at `path` is replaced; what it leads to is not touched.

    Args:
        path: The file.
        content: All of it.
        overwrite: Replace a file that is there.
        durable: Wait until it would outlive a loss of power; for what can be made again that is not worth the wait.

    Raises:
        OutputError: The disk is full, the folder cannot be written, or the file is there and `overwrite` is False;
            nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as out:
            out.write(content)
            if durable:
                out.flush()
                os.fsync(out.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    except OSError as error:
        fix = "free space or choose another folder"
        raise OutputError("cannot write the output", f"{path}: {error.strerror}", fix) from error
    finally:
        with suppress(OSError):  # what could not be made cannot be removed: the reason is said already
            temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, however many.

    Raises:
        OutputError: It cannot be made.
    """
    missing: list[Path] = []
    while not os.path.isdir(path) and path != path.parent:
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        try:
            folder.mkdir(exist_ok=True)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise OutputError("cannot make a folder", f"{folder}: {reason}", "choose another place") from error
