"""The command line as a user meets it: results, exit status, one clear line for everything that is wrong."""

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lorax import load_adapter
from tests.commands import error_of
from tests.conftest import REPORT_SCHEMA, small_base
from tests.tensors import lora_tensors


@pytest.fixture
def words(bases, lora_file, tmp_path):
    source, target = bases[0].files[0], bases[1].files[0]
    return ["transfer", lora_file, "--source", source, "--target", target, "--output", tmp_path / "out.safetensors"]


def test_transfer_writes_the_file_the_report_and_the_picture(run, words, bases, tmp_path):
    out, err = run(
        *words, "--method", "project", "--rank", 24, "--report", tmp_path / "r.json", "--png", tmp_path / "r.png"
    )
    assert "of the update's norm kept" in out
    assert "Warning" not in err  # of Python
    adapter = load_adapter(tmp_path / "out.safetensors", bases[1])
    report = json.loads((tmp_path / "r.json").read_text())
    jsonschema.validate(report, REPORT_SCHEMA)
    assert report["arrived"] == len(adapter.layers) == report["layers"]
    assert out.endswith(f"{tmp_path / 'out.safetensors'}: {report['layers']} by project\n")
    assert adapter.metadata["lorax_method"] == "project"
    assert adapter.metadata["ss_tag_frequency"] == "kept"
    with Image.open(tmp_path / "r.png") as image:
        assert image.width > 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "r.json", "r.png"]


def test_a_weak_effect_warns_with_advice(run, words):
    _, err = run(*words, "--method", "project", "--rank", 2)
    assert "weak effect" in err
    assert "the method copy" in err


def test_same_command_same_bytes(run, words, tmp_path):
    contents = []
    for _ in range(2):
        run(*words, "--method", "subspace-null", "--rank", 8)
        contents.append((tmp_path / "out.safetensors").read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(run, words, tmp_path, dtype):
    run(*words, "--dtype", dtype)
    assert {str(t.dtype) for t in load_file(tmp_path / "out.safetensors").values()} == {f"torch.{dtype}"}


def test_too_many_pairs_for_json_are_refused_before_they_are_compared(run, bases, tmp_path, monkeypatch):
    monkeypatch.setattr("lorax.transfer.report.MOST_JSON", 3)
    monkeypatch.setattr("lorax.compare.similarity.compare_bases", None)
    words = "similarity", bases[0].files[0], bases[1].files[0], "--json", tmp_path / "s.json"
    assert "too many pairs for JSON" in run(*words, status=1)[1]
    assert "too many pairs for JSON" in run(*words, "--layers", "all", status=1)[1]
    assert list(tmp_path.iterdir()) == []


def test_similarity(run, bases, tmp_path):
    out, _ = run(
        "similarity", bases[0].files[0], bases[1].files[0], "--json", tmp_path / "s.json", "--png", tmp_path / "s.png"
    )
    assert "attn2.to_k" in out
    data = json.loads((tmp_path / "s.json").read_text())
    jsonschema.validate(data, REPORT_SCHEMA)
    with Image.open(tmp_path / "s.png") as image:
        assert len(set(image.get_flattened_data() if hasattr(image, "get_flattened_data") else image.getdata())) > 10


def test_similarity_at_a_rank(run, bases):
    run("similarity", bases[0].files[0], bases[1].files[0], "--rank", 8, "--layers", "all")
    assert "whole number" in error_of(run, "similarity", *(b.files[0] for b in bases), "--rank", "some")
    assert "attention or all" in error_of(run, "similarity", *(b.files[0] for b in bases), "--layers", "some")


def test_inspect(run, bases, lora_file):
    out, _ = run("inspect", lora_file)
    assert "kohya" in out
    facts = json.loads(run("inspect", lora_file, "--json")[0])
    assert facts["kind"] == "adapter"
    assert facts["ranks"] == {"4": facts["layers"]}
    adapter = load_adapter(lora_file)
    for row in facts["rows"]:
        assert row["norm"] == pytest.approx(float(adapter.layers[row["layer"]].delta_weight().norm()), rel=1e-4)
    facts = json.loads(run("inspect", bases[0].files[0], "--json")[0])
    assert (facts["kind"], facts["family"], facts["layers"]) == ("base", "sd1", len(bases[0].layers))
    assert facts["parameters"] == sum(t.numel() for t in load_file(bases[0].files[0]).values())


def test_inspect_of_a_base_reads_only_its_header(run, tmp_path, bases):
    """The data of the copy is a hole of 40 GB that no machine could read in time."""
    content = bases[0].files[0].read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    key = "model.diffusion_model.out.2.weight"
    header.pop("__metadata__", None)
    end = max(entry["data_offsets"][1] for entry in header.values())
    header["huge"] = {"dtype": "F32", "shape": [10**10], "data_offsets": [end, end + 4 * 10**10]}
    assert key in header
    text = json.dumps(header).encode()
    with (tmp_path / "huge.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end + 4 * 10**10)
    start = time.monotonic()
    assert "10001671492" in run("inspect", tmp_path / "huge.safetensors")[0]
    assert time.monotonic() - start < 5


def test_convert_there_and_back(run, bases, lora_file, tmp_path):
    source = bases[0].files[0]
    out, err = run("convert", lora_file, "--to", "lora-x", "--source", source, "--rank", 16, "-o", tmp_path / "x")
    assert "kept on average" in out
    assert "keep the LoRA too" in err
    assert load_adapter(tmp_path / "x", bases[0]).kind == "lora-x"
    run("convert", tmp_path / "x", "--to", "lora", "--source", source, "-o", tmp_path / "back", "--naming", "diffusers")
    assert load_adapter(tmp_path / "back", bases[0]).naming == "diffusers"
    assert "--source" in error_of(run, "convert", lora_file, "--to", "lora-x", "-o", tmp_path / "y")
    assert "source base" in error_of(run, "convert", tmp_path / "x", "--to", "lora", "-o", tmp_path / "y")
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("words", [["transfer"], ["bogus"], ["inspect"], ["inspect", "a", "--rank"]], ids=str)
def test_wrong_usage_is_status_2(run, words):
    run(*words, status=2)


def test_help_and_version(run):
    assert "transfer" in run("--help")[0]
    assert run("--version")[0].strip()


HEADER = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
BROKEN = {
    "empty": (b"", "0 bytes"),
    "a few bytes": (b"abc", "3 bytes"),
    "text": (b"hello world, this is no model at all", "not a safetensors"),
    "huge header": ((2**63).to_bytes(8, "little") + b"{}", "header of 9223372036854775808"),
    "truncated": (len(HEADER).to_bytes(8, "little") + HEADER + b"\0\0", "damaged"),
    "no json": ((16).to_bytes(8, "little") + b"x" * 16, "damaged"),
    "zip pickle": (b"PK\x03\x04" + b"\0" * 100, "pickle"),
    "old pickle": (b"\x80\x02}q\x00." + b"\0" * 100, "pickle"),
}


@pytest.mark.parametrize(("content", "words_of"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("place", ["adapter", "source", "target"])
def test_broken_files(run, words, tmp_path, content, words_of, place):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    words[{"adapter": 1, "source": 3, "target": 5}[place]] = path
    line = error_of(run, *words)
    assert words_of in line
    assert "broken.safetensors" in line
    assert [p.name for p in tmp_path.iterdir()] == ["broken.safetensors"]
    assert path.read_bytes() == content


def test_missing_file_folder_without_unet_and_file_without_unet(run, words, tmp_path):
    words[3] = tmp_path / "nowhere"
    assert "nowhere" in error_of(run, *words)
    words[3] = tmp_path
    assert "no U-Net" in error_of(run, *words)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    words[3] = tmp_path / "x.safetensors"
    assert "no diffusion model" in error_of(run, *words)
    assert "no diffusion model" in error_of(run, "inspect", tmp_path / "x.safetensors")


def test_nan_in_adapter_and_base(run, words, bases, lora_file, tmp_path):
    tensors = load_file(lora_file)
    keys = [key for key in tensors if "lora_up" in key]
    for key in keys:
        tensors[key][0, 0] = float("inf")
    save_file(tensors, tmp_path / "nan.safetensors")
    shown = error_of(run, words[0], tmp_path / "nan.safetensors", *words[2:])
    assert any(key in shown for key in keys)
    tensors = load_file(bases[1].files[0])
    key = next(key for key in tensors if key.endswith("attn1.to_q.weight"))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    words[5] = tmp_path / "nan.safetensors"
    assert "NaN or Inf" in error_of(run, *words)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("rank", [0, -5, 10**9])
def test_rank_out_of_range(run, words, rank):
    assert "rank" in error_of(run, *words, "--rank", rank)


def test_outputs_that_cannot_be(run, words, bases, lora_file, tmp_path):
    for place in (lora_file, bases[0].files[0], bases[1].files[0]):
        before = Path(place).read_bytes()
        assert "one of the inputs" in error_of(run, *words[:7], place)
        link = tmp_path / "link"
        link.symlink_to(place)
        assert "one of the inputs" in error_of(run, *words[:7], link)
        assert "one of the inputs" in error_of(run, *words, "--report", place)
        link.unlink()
        assert Path(place).read_bytes() == before
    assert "does not exist" in error_of(run, *words[:7], tmp_path / "no" / "folder")
    assert "two outputs are one file" in error_of(run, *words, "--report", words[7])
    assert "is a folder" in error_of(run, *words[:7], tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "or a device" in error_of(run, *words[:7], tmp_path / "pipe")
    assert "cannot" in error_of(run, *words[:7], "/proc/out.safetensors")


def test_a_name_with_control_characters_and_markup_is_harmless(run, tmp_path):
    path = tmp_path / "\x1b[31mred[bold]x.safetensors"
    path.write_bytes(b"abc")
    line = error_of(run, "inspect", path)
    assert "\x1b" not in line
    assert "[bold]x" in line


def test_no_cuda(run, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA" in error_of(run, *words, "--device", "cuda")


def lorax(*words, **options):
    command = [sys.executable, "-m", "lorax", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_full_disk_leaves_nothing_behind(words, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    process = lorax(*words, preexec_fn=limit)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith("error: cannot write the output")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_interrupt_half_way_leaves_nothing_behind(tmp_path):
    """On a terminal, so that the progress bar tells when half way is."""
    source = small_base(tmp_path / "source.safetensors", model_channels=192)
    small_base(tmp_path / "target.safetensors", change=0.1, model_channels=192)
    save_file(lora_tensors(source), tmp_path / "a.safetensors")
    (tmp_path / "out").mkdir()
    words = ["transfer", "a.safetensors", "--source", "source.safetensors", "--target", "target.safetensors"]
    words += ["-o", "out/x.safetensors", "--method", "subspace-null"]
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-m", "lorax", *words]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = ""
    while not re.search(r"[5-9]/\d\d", shown):
        shown += os.read(ours, 1000).decode()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "interrupted" in os.read(ours, 10000).decode()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("words", [["--help"], ["inspect", "BASE"], ["cache", "info"], ["cache", "clear"]])
def test_what_needs_no_weights_imports_no_torch(words, bases, tmp_path, monkeypatch):
    """The help of a command, and the header of a checkpoint of any size, come at once."""
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path))
    words = [str(bases[0].files[0]) if word == "BASE" else word for word in words]
    code = f"""
import sys
from lorax.cli import app
try:
    app({words!r})
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
def test_the_cache_is_used_shown_checked_and_cleared(run, words, bases, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LORAX_CACHE", str(folder))
    run(*words, "--method", "project", "--no-cache")
    assert not folder.exists()
    plain = (tmp_path / "out.safetensors").read_bytes()
    for _ in range(2):
        run(*words, "--method", "project")
        assert (tmp_path / "out.safetensors").read_bytes() == plain
    run("similarity", bases[0].files[0], bases[1].files[0])
    out, _ = run("cache", "info")
    assert str(folder) in out
    assert [line.split()[0] for line in out.splitlines()[3:]] == ["subspaces", "scores", "digests"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    files[0].write_bytes(b"")
    out, _ = run("cache", "verify")
    assert out.startswith(f"{len(files) - 1} entries are sound, 1 were damaged")
    run("cache", "clear")
    assert not [path for path in folder.rglob("*") if path.is_file()]
    monkeypatch.setenv("LORAX_CACHE_GB", "much")
    assert "LORAX_CACHE_GB=much" in error_of(run, "cache", "info")


def test_inspect_tells_every_kind_of_file(run, bases, lora_file, tmp_path):
    assert json.loads(run("inspect", bases[0].files[0], "--json")[0])["kind"] == "base"
    assert json.loads(run("inspect", lora_file, "--json")[0])["format"] == "lora"
    m = {"lora_unet_x.a1.weight": torch.ones(4, 2), "lora_unet_x.a2.weight": torch.ones(2, 4)}
    m |= {"lora_unet_x.b1.weight": torch.ones(4, 2), "lora_unet_x.b2.weight": torch.ones(2, 4)}
    for kind, tensors in {
        "glora": m,
        "diff": {"lora_unet_x.diff": torch.ones(4, 4)},
        "dora": {
            "unet.x.lora_A.weight": torch.ones(2, 4),
            "unet.x.lora_B.weight": torch.ones(4, 2),
            "unet.x.dora_scale": torch.ones(4, 1),
        },
    }.items():
        save_file(tensors, tmp_path / "a.safetensors")
        facts = json.loads(run("inspect", tmp_path / "a.safetensors", "--json")[0])
        assert (facts["kind"], facts["format"]) == ("adapter", kind)
        assert (facts["norm"] is None) == (kind != "diff")
    assert "norm" in run("inspect", tmp_path / "a.safetensors")[0]
