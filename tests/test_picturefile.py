"""Pictures and captions in files: what is read, against Pillow; what is refused, before it costs anything."""

import io
import os
import random
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks.memory import peak
from lorax import FileError
from lorax.files.picturefile import CAPTION_BYTES, FORMATS, PIXELS, RATIO, open_picture, read_caption
from reliability.readers import Tally

ORIENTATION = 0x0112  # the number of the EXIF tag


def noise(width=40, height=32, mode="RGB"):
    values = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def content(kind, picture=None, **options):
    """Return a picture as the bytes of a file."""
    file = io.BytesIO()
    (picture or noise()).save(file, kind, **options)
    return file.getvalue()


def png(width, height, lines=b""):
    """Return the file of a PNG that says it is of a size, with compressed lines or none."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", lines), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def sealed(data):
    """Return the bytes of a PNG with the checksum of each part made right."""
    data, place = bytearray(data), 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4
    return bytes(data)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
@pytest.mark.parametrize(("kind", "ending"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_a_picture_is_what_pillow_reads(tmp_path, kind, ending, mode):
    path = tmp_path / f"x.{ending}"
    path.write_bytes(content(kind, noise(mode=mode if kind != "JPEG" else mode.rstrip("A"))))
    assert np.array_equal(open_picture(path), Image.open(path).convert("RGB"))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_is_turned_as_its_exif_data_say(tmp_path, kind):
    path = tmp_path / "x.png"
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned by 90 degrees, clockwise
    path.write_bytes(content(kind, exif=exif))
    assert open_picture(path).size == (32, 40)
    assert np.array_equal(open_picture(path), ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert np.array_equal(open_picture(path), np.rot90(np.asarray(Image.open(path)), -1))


OTHERS = ["EPS", "PDF", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "DDS", "JPEG2000"]


@pytest.mark.parametrize("kind", OTHERS)
def test_no_other_format_is_read_whatever_its_name(tmp_path, kind):
    path = tmp_path / "x.png"
    path.write_bytes(content(kind))
    with pytest.raises(FileError, match=r"cannot read a picture.*x\.png"):
        open_picture(path)


# Reads a picture in two ways; says what became of it, and before that whether another program was started.
READ = """
import sys
from pathlib import Path
import PIL.Image, lorax.files.picturefile
PIL.Image.init()
sys.addaudithook(lambda event, _: event == "subprocess.Popen" and print("a program"))
ways = {"ours": lorax.files.picturefile.open_picture, "Pillow's": lambda path: PIL.Image.open(path).load()}
try:
    ways[sys.argv[1]](Path(sys.argv[2]))
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize(("way", "said"), [("ours", "FileError"), ("Pillow's", "a program")])
def test_postscript_starts_no_program(tmp_path, way, said):
    """Pillow, asked for any format, does start one: so the hook sees it."""
    if way == "Pillow's" and shutil.which("gs") is None:
        pytest.skip("no Ghostscript on this machine")
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n0 0 moveto 9 9 lineto showpage\n%%EOF\n")
    done = subprocess.run([sys.executable, "-c", READ, way, path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == said


SIZES = {
    "pixels": (png(4097, 4096), f"more than {PIXELS} pixels"),
    "pixels above Pillow's own limit": (png(20_000, 20_000), "cannot read a picture"),
    "long": (png(RATIO + 1, 1), f"{RATIO} times"),
    "high": (png(1, RATIO + 1), f"{RATIO} times"),
    "nothing": (png(0, 0), "cannot read a picture"),
    "webp": (b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\0VP8 \0\0\0\0", "cannot read a picture"),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_refused_before_a_pixel_is_read(tmp_path, name):
    data, words = SIZES[name]
    path = tmp_path / "x.png"
    path.write_bytes(data)
    before = peak()
    with pytest.raises(FileError, match=words):
        open_picture(path)
    assert peak() - before < 2**24


def test_the_largest_picture_is_read(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png(4096, 4096, zlib.compress(bytes(4097 * 4096))))
    assert open_picture(path).size == (4096, 4096)
    assert path.stat().st_size < 100_000


def test_grey_of_16_bits_is_not_taken_for_white(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(content("PNG", Image.fromarray(np.full((32, 32), 30_000, np.uint16))))
    with pytest.raises(FileError, match="more than 8 bits"):
        open_picture(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_pictures_give_a_clear_error(tmp_path, kind):
    path, tally, chance = tmp_path / "x.png", Tally(), random.Random(kind)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    whole = content(kind, exif=exif)
    for number in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            # the first bytes say what the rest is
            damaged[chance.randrange(len(whole) if number % 2 else 100)] = chance.randrange(256)
        if kind == "PNG":
            damaged = sealed(damaged)
        path.write_bytes(damaged[: chance.randrange(len(whole))] if number % 3 == 0 else damaged)
        tally.files += 1
        tally.results += tally.call(lambda: open_picture(path))
    tally.check()
    assert tally.results
    assert tally.errors


def test_what_is_no_regular_file(tmp_path):
    folder, gone, link = tmp_path / "x.png", tmp_path / "y.png", tmp_path / "z.png"
    folder.mkdir()
    link.symlink_to(gone)
    for path in (folder, gone, link):
        for read in (open_picture, read_caption):
            with pytest.raises(FileError, match="no regular file"):
                read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes in folders")
@pytest.mark.timeout(20)
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    for read in (open_picture, read_caption):
        with pytest.raises(FileError, match="no regular file"):
            read(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("data", "text"), [(b" a cat\n", "a cat"), ("\ufeffun chat ébahi".encode(), "un chat ébahi"), (b"", "")]
)
def test_a_caption_is_its_text(tmp_path, data, text):
    path = tmp_path / "x.txt"
    path.write_bytes(data)
    assert read_caption(path) == text


@pytest.mark.parametrize(
    ("data", "words"), [("un chat ébahi".encode("cp1252"), "UTF-8"), (b"a" * (CAPTION_BYTES + 1), "too long")]
)
def test_a_caption_that_cannot_be_read(tmp_path, data, words):
    path = tmp_path / "x.txt"
    path.write_bytes(data)
    with pytest.raises(FileError, match=words):
        read_caption(path)
