"""GGUF files: the header, and tensors as numbers; quantised ones by the package `gguf`, an extra.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileError
from .tensorfile import (
    ADVICE,
    BYTES,
    DIMENSIONS,
    HEADER_BYTES,
    NAME_CHARACTERS,
    NUMBERS,
    TENSORS,
    Entry,
    TensorFile,
    natural_order,
    open_file,
)

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32
# Quantised numbers lie in blocks within rows, so that convolutions are stored as longer rows, their shape beside them:
# by city96's converter, with which the GGUF files of U-Nets are made.
SHAPE = "comfy.gguf.orig_shape."
# The types of metadata: numbers by their size in bytes, and two more.
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
# The types of tensors that are plain numbers, as safetensors calls them.
PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
# Blocks that become numbers at a time: 2 MB of float32 in blocks of 256, and some times that within the package.
BLOCKS = 2048
UPDATE = "pip install --upgrade gguf, or give the model in a common type such as Q8_0"


class GgufFile(TensorFile):
    """A GGUF file, read as a safetensors file is; quantised tensors come as float32.

    Its shapes are those of torch: the file lists the sizes of a tensor from the last to the first.

    Raises:
        FileError: The file is missing, truncated, or not GGUF; or it is quantised and the package `gguf` is missing.
    """

    kind = "GGUF"

    def tensor(self, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return one tensor, or its rows `[start, stop)`, in the dtype of the file, or float32 where it is quantised.

        Raises:
            FileError: The data cannot be read, is of whole numbers, or the file is no longer what was opened.
        """
        import torch

        entry = self.entries[key]
        if entry.dtype in BYTES:
            return super().tensor(key, rows)
        gguf = _package(f"{key} in {self.path}")
        kind = gguf.GGMLQuantizationType[entry.dtype]
        numbers, nbytes = gguf.GGML_QUANT_SIZES[kind]
        start, stop = rows or (0, entry.shape[0])
        row = math.prod(entry.shape[1:])
        first, last = start * row // numbers, -(-stop * row // numbers)  # rows need not end where blocks do
        content = torch.empty(last - first, nbytes, dtype=torch.uint8)
        self._read(content.numpy().reshape(-1).data, entry.offset + first * nbytes)
        found = torch.empty(last - first, numbers)
        for place in range(0, last - first, BLOCKS):
            part = content[place : place + BLOCKS].numpy().reshape(1, -1)
            found[place : place + BLOCKS] = torch.from_numpy(
                _dequantised(gguf, part, kind, f"{key} is {entry.dtype} in {self.path}")
            ).reshape(-1, numbers)
        skipped = start * row - first * numbers
        return found.reshape(-1)[skipped : skipped + (stop - start) * row].reshape(stop - start, *entry.shape[1:])

    def _header(self, handle: BufferedReader) -> tuple[dict[str, str], dict[str, Entry]]:
        header = _Header(self.path, handle)
        if handle.read(4) != MAGIC or header.number(4) not in VERSIONS:
            raise ValueError("not GGUF of version 2 or 3")
        tensors, fields = header.number(), header.number()
        if tensors > TENSORS:
            raise FileError(f"more than {TENSORS} tensors", f"{self.path} has {tensors}", ADVICE)
        metadata = {header.text(): header.value(header.number(4)) for _ in range(fields)}
        described = [(header.text(), header.sizes(), header.number(4), header.number()) for _ in range(tensors)]
        alignment = metadata.get(ALIGNMENT, DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"an alignment of {alignment}")
        start = -(-handle.tell() // alignment) * alignment
        found: dict[str, Entry] = {}
        if long := next((key for key, *_ in described if len(key) > NAME_CHARACTERS), ""):
            got = f"{long[:40]}... in {self.path}"
            raise FileError(f"a name of more than {NAME_CHARACTERS} characters", got, ADVICE)
        for key, sizes, number, offset in sorted(described, key=lambda each: natural_order(each[0])):
            shape = sizes[::-1]
            name, numbers, nbytes = self._type(key, number)
            count = math.prod(shape)
            if key in found or count % numbers or start + offset + count // numbers * nbytes > self.state[0]:
                raise ValueError(f"{key} is there twice, or not whole")
            if stored := metadata.get(SHAPE + key):
                shape = tuple(stored) if isinstance(stored, list) else ()
                if math.prod(shape) != count:
                    raise ValueError(f"{key} of {count} numbers has the shape {stored}")
            if math.prod(max(size, 1) for size in shape) > NUMBERS:
                raise FileError("a tensor larger than any model", f"{key} {list(shape)} in {self.path}", ADVICE)
            found[key] = Entry(shape, name, start + offset, count // numbers * nbytes)
        return {key: value for key, value in metadata.items() if isinstance(value, str)}, found

    def _type(self, key: str, number: int) -> tuple[str, int, int]:
        """Return the name of a type by its number, how many numbers are in a block of it, and in how many bytes."""
        if name := PLAIN.get(number):
            return name, 1, BYTES[name]
        gguf = _package(f"{key} in {self.path}")
        try:
            kind = gguf.GGMLQuantizationType(number)
            return kind.name, *gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            got = f"{key} in {self.path} is of the type {number}"
            raise FileError("a type of weights that the package gguf does not know", got, UPDATE) from error


class _Header:
    """The header of a file, read number by number."""

    def __init__(self, path: Path, handle: BufferedReader) -> None:
        self._path, self._handle = path, handle

    def number(self, size: int = 8) -> int:
        """Return a whole number of `size` bytes."""
        return int.from_bytes(self._bytes(size), "little")

    def text(self) -> str:
        """Return a text, whose length comes first."""
        return self._bytes(self.number()).decode()

    def sizes(self) -> tuple[int, ...]:
        """Return the sizes of a tensor, whose count comes first.

        Raises:
            FileError: There are too many.
        """
        count = self.number(4)
        if count > DIMENSIONS:
            raise FileError(f"a tensor of more than {DIMENSIONS} dimensions", f"{self._path} has {count}", ADVICE)
        return tuple(self.number() for _ in range(count))

    def value(self, kind: int) -> str | int | list[int] | None:
        """Return metadata of a type: a text, a whole number or a few; None for what is never asked for.

        Raises:
            ValueError: There is no such type.
        """
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        kind, count = (self.number(4), self.number()) if kind == ARRAY else (kind, 0)
        if kind == STRING:
            for _ in range(count):
                self.text()
            return None
        if kind not in SCALARS:
            raise ValueError(f"metadata of the type {kind}")
        content, size = self._bytes(count * SCALARS[kind]), SCALARS[kind]
        if count > DIMENSIONS:
            return None
        return [int.from_bytes(content[place : place + size], "little") for place in range(0, len(content), size)]

    def _bytes(self, count: int) -> bytes:
        if self._handle.tell() + count > HEADER_BYTES:
            raise FileError("the header is too large", f"{self._path}: above {HEADER_BYTES} bytes", ADVICE)
        content = self._handle.read(count)
        if len(content) < count:
            raise ValueError("it ends within its header")
        return content


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Open a file of weights, safetensors or GGUF, told by how it begins.

    Raises:
        FileError: The file is missing, damaged or neither.
    """
    is_gguf = False
    with suppress(OSError), open_file(Path(path)) as handle:
        is_gguf = handle.read(len(MAGIC)) == MAGIC
    return (GgufFile if is_gguf else TensorFile)(path)


def _package(got: str) -> Any:
    """Return the package that knows the quantised types.

    Args:
        got: What asks for it.
    """
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise FileError("quantised GGUF weights need the package gguf", got, "pip install gguf") from error
    return gguf


def _dequantised(gguf: Any, blocks: Any, kind: Any, got: str) -> Any:
    """Return blocks of a quantised type as an array of float32."""
    import numpy

    try:
        with numpy.errstate(all="ignore"):  # scales of NaN or Inf are told where the weight is checked
            return gguf.quants.dequantize(blocks, kind)
    except NotImplementedError as error:
        raise FileError("a type of weights that the package gguf does not read", got, UPDATE) from error
