"""Safetensors files: opened lazily, read one tensor at a time, made as bytes.

torch is imported when a tensor is asked for: a header alone is read at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .errors import FileError

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
ADVICE = "download or export it again"
# What a file may hold: more is refused before it costs time or memory. The numbers are ours, far above what is in use.
# The library stops at headers of 100 MB; the largest in use have some MB, of lists of tags and pictures.
# It holds for documents (assignments, configurations) too.
HEADER_BYTES = 32 * 2**20
# The largest models and adapters have some thousand tensors; to find the layers of one takes up to 0.1 ms.
TENSORS = 20_000
# The longest names of modules have about 150 characters.
NAME_CHARACTERS = 1000
# The weight of a three-dimensional convolution has 5.
DIMENSIONS = 8
# Numbers in one tensor: more than in all files of the largest model there is.
NUMBERS = 2**40

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
            with self.path.open("rb") as handle:
                handle.seek(8)
                header = parse_json(handle.read(length), objects=TENSORS + 2)
            with safe_open(str(self.path), framework="np"):
                pass  # the library has now checked the header, and that the data is all there
        except (SafetensorError, OSError, ValueError) as error:
            raise FileError("damaged safetensors file", f"{self.path}: {error}", ADVICE) from error
        if len(header) > TENSORS + ("__metadata__" in header):
            raise FileError(f"more than {TENSORS} tensors", f"{self.path} has {len(header)}", ADVICE)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        entries: dict[str, Entry] = {}
        for key in sorted(header, key=lambda key: _natural(key[:NAME_CHARACTERS])):
            begin, end = header[key]["data_offsets"]
            entry = Entry(tuple(header[key]["shape"]), header[key]["dtype"], 8 + length + begin, end - begin)
            _check_entry(self.path, key, entry)
            entries[key] = entry
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


def _check_entry(path: Path, key: str, entry: Entry) -> None:
    """Refuse a tensor that no model has, however small its data."""
    if len(key) > NAME_CHARACTERS:
        raise FileError(f"a name of more than {NAME_CHARACTERS} characters", f"{key[:40]}... in {path}", ADVICE)
    if len(entry.shape) > DIMENSIONS:
        got = f"{key} in {path} has {len(entry.shape)}"
        raise FileError(f"a tensor of more than {DIMENSIONS} dimensions", got, ADVICE)
    if math.prod(max(size, 1) for size in entry.shape) > NUMBERS:
        raise FileError("a tensor larger than any model", f"{key} {list(entry.shape)} in {path}", ADVICE)


def parse_json(text: str | bytes, *, objects: int | None = None) -> Any:
    """Return what a JSON text from outside says.

    Args:
        text: The text.
        objects: The most objects that it may hold; None sets no limit.

    Raises:
        ValueError: It is no JSON, says a name twice, is nested deeper than Python follows, or holds too many objects.
    """
    seen = 0

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal seen
        seen += 1
        if objects is not None and seen > objects:
            raise ValueError(f"holds more than {objects} objects")
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=made)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_json(path: Path) -> Any:
    """Return what a JSON file says.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no ordinary file, larger than HEADER_BYTES, or no JSON.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode) or state.st_size > HEADER_BYTES:
        raise ValueError("no ordinary file, or too large")
    return parse_json(path.read_text(encoding="utf-8"))


def _header_length(path: Path) -> int:
    """Return the length of the header, after refusing what is plainly no safetensors file."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # to open a pipe is to wait
            raise FileError("not a file", str(path), "give a safetensors file")
        size = state.st_size
        with path.open("rb") as handle:
            start, opening = handle.read(8), handle.read(1)
    except OSError as error:
        raise FileError("cannot open a file", f"{path}: {error.strerror}", "check the path") from error
    if start.startswith(PICKLE_STARTS) and opening != b"{":  # a header of 640 bytes starts as a pickle does
        raise FileError("pickle files are never read, they can run code", str(path), "convert it to safetensors first")
    length = int.from_bytes(start, "little")
    if len(start) < 8:
        raise FileError("not a safetensors file", f"{path} has {size} bytes", ADVICE)
    if length > size - 8:
        raise FileError("truncated, or not a safetensors file", f"{path}: header of {length} in {size} bytes", ADVICE)
    if length > HEADER_BYTES:
        raise FileError("the header is too large", f"{path}: {length} of at most {HEADER_BYTES} bytes", ADVICE)
    return length


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hex; empty where it cannot be read."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return ""


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
