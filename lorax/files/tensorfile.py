"""Safetensors files: opened lazily, read one tensor at a time, made as bytes.

torch is imported when a tensor is asked for: a header alone is read at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import FileError
from .longpath import on_disk

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# First bytes, in lower case, of what people take for a safetensors file -> what it is, and what to do.
OTHERS = {
    b"gguf": ("a GGUF file where safetensors is wanted", "give it in fp32, fp16, bf16 or fp8; a base may be GGUF"),
    b"version ": ("a pointer of Git LFS, not the file itself", "run git lfs pull"),
    b"<!doctyp": ("a web page, not the file itself", "download it again, logged in where that is needed"),
    b"<html": ("a web page, not the file itself", "download it again, logged in where that is needed"),
}
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
# Bytes of a number of a dtype that is read. The format grows by dtypes now and then: of others the size is not checked.
BYTES = {name: int("".join(c for c in name.partition("_")[0] if c.isdigit())) // 8 for name in (*DTYPES, *WHOLE)}

# What tells one state of a file from another: its size, when it was written, and when anything of it changed. Windows
# has no such time, and a number for each file; elsewhere that number is not fixed on every mount.
State = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file as its header describes it: shape, dtype name (`F16`, `F32`, ...), first byte and size."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


class TensorFile:
    """A safetensors file of which only the header is read until a tensor is asked for.

    The data is read tensor by tensor and not mapped: mapped pages would count as memory of the process, and a file that
    is cut short meanwhile would end it. Nothing is held open: Windows lets no one replace a file that is open.

    Args:
        path: The file.

    Attributes:
        kind: What the format is called.
        path: The file.
        state: What tells its state when it was opened from any other; see `file_state`.
        metadata: What its header says beside the tensors.
        entries: Its tensors, in the order of their names.

    Raises:
        FileError: The file is missing, empty, truncated, a pickle, or not safetensors.
    """

    kind = "safetensors"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open_file(self.path) as handle:
                self.state = file_state(handle.fileno())
                try:
                    self.metadata, self.entries = self._header(handle)
                finally:
                    self._check_unchanged(handle)
        except OSError as error:
            raise FileError("cannot open a file", f"{self.path}: {error.strerror}", "check the path") from error
        except ValueError as error:
            raise FileError(f"damaged {self.kind} file", f"{self.path}: {error}", ADVICE) from error

    def tensor(self, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return one tensor, or its rows `[start, stop)`, in the dtype of the file.

        Raises:
            FileError: The data cannot be read, is not of a floating dtype, or the file is no longer what was opened.
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
        if not content.numel():
            return torch.empty(shape, dtype=dtype)
        self._read(content.numpy().data, entry.offset + start * row)
        return content.view(dtype).reshape(shape)

    def content(self) -> bytes:
        """Return all bytes of the file.

        Raises:
            FileError: They cannot be read, or the file is no longer what was opened.
        """
        content = bytearray(self.state[0])
        self._read(memoryview(content), 0)
        return bytes(content)

    def _header(self, handle: BufferedReader) -> tuple[dict[str, str], dict[str, Entry]]:
        """Return the metadata and the tensors.

        Raises:
            ValueError: The header is damaged.
            FileError: The file is of another format, or beyond the limits.
        """
        text, size = _header(self.path, handle, self.state[0])
        return _read_header(self.path, parse_json(text.decode(), objects=TENSORS + 2), size, 8 + len(text))

    def _read(self, content: memoryview, place: int) -> None:
        try:
            with open_file(self.path) as handle:
                self._check_unchanged(handle)
                handle.seek(place)
                count = handle.readinto(content)
                self._check_unchanged(handle)
            if count != len(content):
                raise OSError(errno.EIO, "it ends too early")
        except OSError as error:
            got = f"{self.path}: {error.strerror}"
            raise FileError(
                "cannot read a file that was opened before", got, "check the disk, then do it again"
            ) from error

    def _check_unchanged(self, handle: BufferedReader) -> None:
        """Refuse what another program has written since it was opened: parts of two states are no model."""
        if file_state(handle.fileno()) != self.state:
            fix = "do it again when no other program writes to it"
            raise FileError("the file changed while it was used", str(self.path), fix)


def open_file(path: Path) -> BufferedReader:
    """Open a file to read; what is no ordinary file, such as a pipe, is not waited for.

    Raises:
        OSError: It cannot be opened, or is no ordinary file.
    """
    try:
        descriptor = os.open(on_disk(path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a name with NUL or half of a character
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file", str(path))
    return os.fdopen(descriptor, "rb")


def file_state(file: int | Path) -> State:
    """Return what tells the state of a file, by its descriptor or path, from any other.

    Raises:
        OSError: It is not there.
    """
    found = os.stat(file if isinstance(file, int) else on_disk(file))
    return found.st_size, found.st_mtime_ns, found.st_ino if os.name == "nt" else found.st_ctime_ns


def natural_order(key: str) -> list[str | int]:
    """Sort numbers by value: `blocks.2` before `blocks.10`. The order in which the file lists its keys is not fixed."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", key)]


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
        OSError: It cannot be read, or is no ordinary file.
        ValueError: It is larger than HEADER_BYTES, or no JSON.
    """
    with open_file(path) as handle:
        content = handle.read(HEADER_BYTES + 1)
    if len(content) > HEADER_BYTES:
        raise ValueError("too large")
    return parse_json(content.decode())


def _header(path: Path, handle: BufferedReader, size: int) -> tuple[bytes, int]:
    """Return the text of the header and the size of the data, after refusing what is plainly no safetensors file."""
    start, opening = handle.read(8), handle.read(1)
    if start.startswith(PICKLE_STARTS) and opening != b"{":  # a header of 640 bytes starts as a pickle does
        raise FileError("pickle files are never read, they can run code", str(path), "convert it to safetensors first")
    for other, (what, fix) in OTHERS.items():
        if start.lower().startswith(other) and opening != b"{":
            raise FileError(what, str(path), fix)
    length = int.from_bytes(start, "little")
    if len(start) < 8:
        raise FileError("not a safetensors file", f"{path} has {size} bytes", ADVICE)
    if length > size - 8:
        raise FileError("truncated, or not a safetensors file", f"{path}: header of {length} in {size} bytes", ADVICE)
    if length > HEADER_BYTES:
        raise FileError("the header is too large", f"{path}: {length} of at most {HEADER_BYTES} bytes", ADVICE)
    handle.seek(8)
    return handle.read(length), size - 8 - length


def _read_header(path: Path, header: Any, size: int, start: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Return the metadata and the tensors of a header, checked as the library does when it maps a file.

    Args:
        path: The file.
        header: What the header says.
        size: How many bytes of data there are.
        start: Where they begin.

    Raises:
        ValueError: It is no header, or the tensors do not fill the data one after the other.
        FileError: It is beyond the limits.
    """
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    found = cast("dict[str, Any]", header)
    metadata: Any = found.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("metadata that is no text")
    if len(found) > TENSORS:
        raise FileError(f"more than {TENSORS} tensors", f"{path} has {len(found)}", ADVICE)
    for text in (*found, *metadata, *metadata.values()):
        text.encode()  # refuses half of a character
    names = sorted(found, key=lambda key: natural_order(key[:NAME_CHARACTERS]))
    entries = {key: _entry(path, key, found[key], start) for key in names}
    place = start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != place:
            raise ValueError(f"the data of {key[:NAME_CHARACTERS]} does not begin where the last ended")
        place += entry.nbytes
    if place != start + size:
        raise ValueError(f"{size} bytes of data where the header tells of {place - start}")
    return metadata, entries


def _entry(path: Path, key: str, stored: Any, start: int) -> Entry:
    if len(key) > NAME_CHARACTERS:
        raise FileError(f"a name of more than {NAME_CHARACTERS} characters", f"{key[:40]}... in {path}", ADVICE)
    try:
        shape, dtype, (begin, end) = stored["shape"], stored["dtype"], stored["data_offsets"]
        numbers = all(type(number) is int and 0 <= number < 2**64 for number in (*shape, begin, end))
        if not numbers or not isinstance(shape, list) or not isinstance(dtype, str):
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"no shape, dtype or place of {key}") from error
    if len(shape) > DIMENSIONS:
        got = f"{key} in {path} has {len(shape)}"
        raise FileError(f"a tensor of more than {DIMENSIONS} dimensions", got, ADVICE)
    if math.prod(max(size, 1) for size in shape) > NUMBERS:
        raise FileError("a tensor larger than any model", f"{key} {shape} in {path}", ADVICE)
    if begin > end or math.prod(shape) * BYTES.get(dtype, 0) != (end - begin if dtype in BYTES else 0):
        raise ValueError(f"{key} has {end - begin} bytes for {shape} of {dtype}")
    return Entry(tuple(shape), dtype, start + begin, end - begin)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hex; empty where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open_file(path) as handle:
            while part := handle.read(2**20):
                digest.update(part)
    except OSError:
        return ""
    return digest.hexdigest()


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file as bytes; the same input always gives the same bytes.

    The library writes the metadata in random order, so the header is put in order here. What is no UTF-8, such as a
    file may have in its name, is escaped.
    """
    from safetensors.torch import save

    content = save(
        {key: tensors[key].detach().to("cpu").contiguous().clone() for key in sorted(tensors)},
        {key: value.encode("utf-8", "backslashreplace").decode() for key, value in metadata.items()},
    )
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
