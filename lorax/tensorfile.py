"""Safetensors files: opened lazily, read one tensor at a time, written whole or not at all.

torch is imported when a tensor is asked for: a header alone is read at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from .errors import FileError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
ADVICE = "download or export it again"


# The names of dtypes in a file and in torch.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
# Only for single numbers, such as an alpha: whole-number weights are quantised and mean something else.
WHOLE = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file as its header describes it: shape, dtype name (`F16`, `F32`, ...), first byte and size."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


class TensorFile:
    """A safetensors file of which only the header is read until a tensor is asked for.

    The library checks the header. The data is read tensor by tensor and not mapped: mapped pages would count
    as memory of the process, and a file that is cut short meanwhile would end it.

    Args:
        path: The file.

    Raises:
        FileError: The file is missing, empty, truncated, a pickle, or not safetensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        length = _header_length(self.path)
        try:
            with safe_open(str(self.path), framework="np"):
                pass  # the library has now checked the header, and that the data is all there
            with self.path.open("rb") as handle:
                handle.seek(8)
                header = json.loads(handle.read(length))
        except (SafetensorError, OSError) as error:
            raise FileError("damaged safetensors file", f"{self.path}: {error}", ADVICE) from error
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        entries: dict[str, Entry] = {}
        for key in sorted(header, key=_natural):
            begin, end = header[key]["data_offsets"]
            entries[key] = Entry(tuple(header[key]["shape"]), header[key]["dtype"], 8 + length + begin, end - begin)
        self.entries = entries

    def tensor(self, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return one tensor, or its rows `[start, stop)`, in the dtype of the file.

        Raises:
            FileError: The data cannot be read, or is not of a floating dtype.
        """
        import torch

        entry = self.entries[key]
        name = DTYPES.get(entry.dtype) or (WHOLE.get(entry.dtype) if math.prod(entry.shape) == 1 else None)
        if name is None:
            got = f"{key} in {self.path} is {entry.dtype}"
            raise FileError("a weight of a dtype that is not read", got, f"store it as one of {', '.join(DTYPES)}")
        start, stop = rows or (0, entry.shape[0] if entry.shape else 1)
        row = entry.nbytes // max(1, entry.shape[0] if entry.shape else 1)
        dtype: torch.dtype = getattr(torch, name)
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        # Read to where torch puts its tensors: products with a vector round by the alignment of the data.
        content = torch.empty((stop - start) * row, dtype=torch.uint8)
        try:
            with self.path.open("rb") as handle:
                handle.seek(entry.offset + start * row)
                count = handle.readinto(content.numpy().data) if content.numel() else 0
        except OSError as error:
            raise FileError("cannot read a tensor", f"{key} in {self.path}: {error.strerror}", ADVICE) from error
        if count != content.numel():
            raise FileError("the file was cut short", f"{key} in {self.path}", ADVICE)
        return content.view(dtype).reshape(shape) if content.numel() else torch.empty(shape, dtype=dtype)


def _natural(key: str) -> list[str | int]:
    """Sort numbers by value: `blocks.2` before `blocks.10`. The order in which the file lists its keys is not fixed."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", key)]


def _header_length(path: Path) -> int:
    """Return the length of the header, after refusing what is plainly no safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            start = handle.read(8)
    except OSError as error:
        raise FileError("cannot open a file", f"{path}: {error.strerror}", "check the path") from error
    if start.startswith(PICKLE_STARTS):
        raise FileError("pickle files are never read, they can run code", str(path), "convert it to safetensors first")
    length = int.from_bytes(start, "little")
    if len(start) < 8:
        raise FileError("not a safetensors file", f"{path} has {size} bytes", ADVICE)
    if length > size - 8:
        raise FileError("truncated, or not a safetensors file", f"{path}: header of {length} in {size} bytes", ADVICE)
    return length


def check_output(path: str | os.PathLike[str], inputs: list[Path]) -> Path:
    """Check, before any work is done, that `path` can be written and is none of `inputs`.

    Returns:
        The path.

    Raises:
        OutputError: It is an input, a folder or a device, or its folder is missing or not writable.
    """
    out = Path(path)
    if any(out.exists() and given.exists() and out.samefile(given) for given in inputs):
        raise OutputError("the output is one of the inputs", str(out), "choose another name")
    if out.exists() and not out.is_file():
        raise OutputError("the output is a folder or a device", str(out), "give a file name")
    if not out.parent.is_dir():
        raise OutputError("the output's folder does not exist", str(out.parent), "create it first")
    if not os.access(out.parent, os.W_OK):
        raise OutputError("the output's folder cannot be written", str(out.parent), "choose another folder")
    return out


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hex; empty where it cannot be read."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return ""


def write_bytes(path: Path, content: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
    """Write `content` to a temporary name beside `path`, then rename: whole or not at all.

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
        temporary.unlink(missing_ok=True)


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file as bytes; the same input always gives the same bytes.

    The library writes the metadata in random order, so the header is put in order here.
    """
    from safetensors.torch import save

    content = save(
        {key: tensors[key].detach().to("cpu").contiguous().clone() for key in sorted(tensors)}, dict(metadata)
    )
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
