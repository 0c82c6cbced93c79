"""Pictures and their captions in files: of named formats, of a bounded size, and never more than asked for.

Needs Pillow, which is in the extras `cli` and `evaluate`.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FileError

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp"})
# Pillow tells a format by the content, whatever the name says, and hands PostScript to a program of its own.
FORMATS = ("PNG", "JPEG", "WEBP")
# 4096 x 4096. What compares pictures needs some hundred bytes for a pixel, and a file of half a megabyte can hold
# Pillow's own limit of 179 million.
PIXELS = 2**24
# Width to height: models enlarge the shorter side to some hundred pixels and keep the ratio.
RATIO = 32
# The text models read 77 tokens of a caption.
CAPTION_BYTES = 2**16
ADVICE = "take it out of the folder"
# What Pillow's readers raise where a file is damaged.
DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)


def open_picture(path: Path) -> Image.Image:
    """Return the picture in a file, as it is seen (turned as its EXIF data say), in RGB.

    Raises:
        FileError: It is no PNG, JPEG or WebP, damaged, too large or too long, or of 16 bits in grey.
    """
    from PIL import Image, ImageOps

    _check_regular(path, "picture")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            _check_size(path, picture)
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise FileError("cannot read a picture", f"{path}: {error}", f"{ADVICE}, or save it as PNG") from error


def read_caption(path: Path) -> str:
    """Return the text of a caption file, without the blanks around it.

    Raises:
        FileError: It is no regular file, too long, or no UTF-8.
    """
    _check_regular(path, "caption")
    try:
        with path.open("rb") as file:
            content = file.read(CAPTION_BYTES + 1)
        if len(content) > CAPTION_BYTES:
            raise FileError("a caption that is too long", f"{path} has more than {CAPTION_BYTES} bytes", "shorten it")
        return content.decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError("cannot read a caption", f"{path}: {error}", "save it as UTF-8") from error


def _check_regular(path: Path, what: str) -> None:
    if not path.is_file():  # to open a pipe waits for ever
        raise FileError(f"a {what} is no regular file", str(path), ADVICE)


def _check_size(path: Path, picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > PIXELS:
        got = f"{path} has {width} x {height}"
        raise FileError(f"a picture of more than {PIXELS} pixels", got, "make it smaller")
    if max(width, height) > RATIO * min(width, height):
        got = f"{path} has {width} x {height}"
        raise FileError(f"a picture more than {RATIO} times as long as wide", got, ADVICE)
    if picture.mode.startswith(("I", "F")):
        got = f"{path} has pixels of kind {picture.mode}"
        raise FileError("a grey picture of more than 8 bits", got, "save it with 8 bits a channel")
