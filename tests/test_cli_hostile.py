"""Every command with every argument that anyone could give it: one clear line, and a status that says so."""

import io
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorax import cli
from lorax.entry import ENDINGS
from reliability import seeds

ROOT = Path(__file__).parents[1]

# What no file can be read from, and nothing written to.
NO_INPUT = ["", ".", "nowhere", "empty", "pipe", "circle", "a.safetensors/x", "/dev/full", "/proc/\x1b[31m", "x" * 5000,
            "d/" * 1500 + "x", os.fsdecode(b"\xff")]  # fmt: skip
NO_OUTPUT = ["", ".", "pipe", "0.safetensors", "circle/x", "a.safetensors/x", "/dev/null", "/dev/full", "x" * 5000,
             "d/" * 1500 + "x", os.fsdecode(b"\xff/x")]  # fmt: skip
NO_NUMBER = ["", "x", "\N{SUPERSCRIPT TWO}", "1.5x", "[/]", "9" * 5000, os.fsdecode(b"\xff"), ":heart:"]
# Ranks that are whole numbers and none that could be.
NO_RANK = [*NO_NUMBER, "0", "-1", "nan", "9" * 30]
# Names that are odd and right.
ODD = ["[red]:heart:[link=x]", "\N{CJK UNIFIED IDEOGRAPH-4E2D}\N{RIGHTWARDS ARROW}\u0301", "a\nb\x1b[31m\u202e",
       os.fsdecode(b"\xff\xfe"), " ", "-", "'\"", "%s{0}", "_" * 200]  # fmt: skip

BASES = ["--source", "0.safetensors", "--target", "1.safetensors"]
TRANSFER = ["transfer", "a.safetensors", *BASES, "-o", "out"]
MIGRATE = ["migrate", "loras", *BASES, "-o", "out"]
CONVERT = ["convert", "a.safetensors", "--to", "lora-x", "--source", "0.safetensors", "-o", "out"]
SIMILARITY = ["similarity", "0.safetensors", "1.safetensors"]
# The words of a command, the place of one of them or an option after them, and what cannot be there.
CASES = [
    (["inspect", "a.safetensors"], 1, NO_INPUT),
    (["inspect", "a.safetensors", "--json"], 1, NO_INPUT),
    *((SIMILARITY, place, NO_INPUT) for place in (1, 2)),
    (SIMILARITY, "--rank", NO_RANK),
    (SIMILARITY, "--layers", NO_NUMBER),
    *((SIMILARITY, option, NO_OUTPUT) for option in ("--json", "--png", "--html")),
    *((TRANSFER, place, NO_INPUT) for place in (1, 3, 5, "--assignment")),
    *((TRANSFER, place, NO_OUTPUT) for place in (7, "--report", "--png", "--html", "--save-assignment")),
    *((TRANSFER, option, NO_NUMBER) for option in ("--threshold", "--method", "--format", "--device", "--dtype")),
    (TRANSFER, "--rank", NO_RANK),
    *((CONVERT, place, NO_INPUT) for place in (1, 5)),
    (CONVERT, 7, NO_OUTPUT),
    (CONVERT, "--rank", NO_RANK),
    # What is wrong with a base of a migration is said of each adapter, by its workers.
    (MIGRATE, 1, [name for name in NO_INPUT if name not in ("", ".")]),
    (MIGRATE, 7, ["pipe", "a.safetensors", "a.safetensors/x", "/dev/full", "x" * 5000, "/proc/x"]),
    (MIGRATE, "--report", NO_OUTPUT),
    (MIGRATE, "--workers", [*NO_NUMBER, "0", "-1"]),
    (MIGRATE, "--gpu-share", [*NO_NUMBER, "-1", "nan", "inf"]),
    (["migrate", "loras", "-o", "out"], "--manifest", NO_INPUT),
    *((["evaluate", "loras"], place, NO_INPUT) for place in (1, "--hpsv2", "--lpips", "--dinov2", "--reference")),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with two bases, an adapter, a folder of one, and what is none of these."""
    for i in range(2):
        seeds.base_file(tmp_path / f"{i}.safetensors", change=0.2 * i)
    (tmp_path / "a.safetensors").write_bytes(seeds.adapters()["lora"])
    (tmp_path / "loras").mkdir()
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "loras")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_word(words, place, value):
    return [*words, place, value] if isinstance(place, str) else [*words[:place], value, *words[place + 1 :]]


def ended(words, monkeypatch, encoding="utf-8"):
    """Run a command on consoles of an encoding that refuse what they cannot show; return status, output and errors."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "argv", ["lorax", *words])
    handlers = {number: signal.getsignal(number) for number in ENDINGS}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    for stream in streams:
        stream.flush()
    return status, *(stream.buffer.getvalue().decode(encoding) for stream in streams)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "place", "values"), CASES, ids=lambda case: str(case)[:40])
def test_what_cannot_be_is_said_in_one_line(here, words, place, values, monkeypatch):
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    for value in values:
        status, _, err = ended(with_word(words, place, value), monkeypatch)
        assert status in (1, 2), (value, err)
        if status == 1:
            (line,) = (line for line in err.split("\n")[:-1] if not line.startswith("warning: "))
            assert line.startswith("error: "), value
            assert line.isprintable()
            assert "the system refuses" not in line
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
@pytest.mark.parametrize("name", ODD)
def test_odd_names_on_any_console(here, name, encoding, monkeypatch):
    """As names of an adapter, of bases and of outputs, and in the header of a file."""
    for i, file in enumerate(("0.safetensors", "1.safetensors")):
        (here / f"{name}{i}").write_bytes((here / file).read_bytes())
    tensors = load_file(here / "a.safetensors")
    save_file(tensors | {f"{name!r}.lora_up.weight": torch.ones(1, 1)}, here / name, {"note": ":heart: [b]"})
    commands = [
        ["inspect", "--", name], ["inspect", "--", f"{name}0"],
        ["transfer", "--source", f"{name}0", "--target", f"{name}1", "-o", f"{name}out", "--report", f"{name}r",
         "--png", f"{name}p", "--html", f"{name}h", "--save-assignment", f"{name}a", "--", name],
        ["convert", "--to", "lora", "--source", f"{name}0", "-o", f"{name}c", "--", name],
        ["similarity", "--json", f"{name}s", "--", f"{name}0", f"{name}1"],
    ]  # fmt: skip
    for words in commands:
        status, out, err = ended(words, monkeypatch, encoding)
        assert (status, "\x1b" in out + err) == (0, False), err
        assert all(line.isprintable() for line in (out + err).splitlines())
    status, out, _ = ended(["inspect", "--json", "--", name], monkeypatch, encoding)
    assert json.loads(out)["metadata"] == {"note": ":heart: [b]"}
    assert "\N{HEAVY BLACK HEART}" not in out
    status, _, err = ended(["inspect", "--", f"{name}/nothing"], monkeypatch, encoding)
    assert (status, err.count("\n")) == (1, 1)


@pytest.mark.parametrize("words", [["--help"], ["transfer", "--help"], ["nonsense\N{RIGHTWARDS ARROW}[/]"], ["cache"]])
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_help_and_usage_on_any_console(words, encoding, monkeypatch):
    status, out, err = ended(words, monkeypatch, encoding)
    assert status in (0, 2)
    assert len(out + err) > 50


def lorax(*words, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lorax", *words]
    return subprocess.run(command, check=False, env=environment, stdin=subprocess.DEVNULL, **options)


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["inspect", "0.safetensors"], ["cache", "--help"]], ids=str
)
@pytest.mark.slow
def test_a_full_device_is_no_place_to_print(here, words):
    with open("/dev/full", "w") as full:
        done = lorax(*words, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert (
            done.stderr == "error: the system refuses: No space left on device; see to the disk and its permissions\n"
        )
        assert lorax(*words, stdout=full, stderr=full).returncode == 1
        assert lorax("inspect", "nowhere", stderr=full).returncode == 1


def test_no_console_at_all(here):
    """As `pythonw` has it, and `>&-`."""

    def close():
        os.close(1)
        os.close(2)

    assert lorax("inspect", "0.safetensors", preexec_fn=close).returncode == 0
    assert lorax("inspect", "nowhere", preexec_fn=close).returncode == 1


def test_a_user_without_a_home(here, monkeypatch):
    """Whom the system does not know, in a container, say: nothing is kept, and all else works."""

    def unknown(_):
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "LORAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for words in (["inspect", "0.safetensors"], [*TRANSFER, "--method", "project", "--rank", "8"], SIMILARITY):
        status, _, err = ended(words, monkeypatch)
        assert (status, "Traceback" in err) == (0, False), err
    status, _, err = ended(["cache", "info"], monkeypatch)
    assert (status, err.count("\n"), err.startswith("error: ")) == (1, 1, True)
