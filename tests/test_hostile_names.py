"""What names in files try: none reaches the screen as it is, and no path from a file is followed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lorax import (
    FileError,
    TransferOptions,
    compare_bases,
    load_adapter,
    open_base,
    save_adapter,
    similarity_json,
    transfer_adapter,
)
from lorax.console import png
from lorax.inspect import describe
from lorax.show.pictures import retained_picture
from reliability import seeds
from tests.commands import ROOT, RUN

# What a name may try: colours, a cursor that moves, a bell, a new line, text that runs backwards, markup, HTML, a path.
EVIL = "\x1b[31m\x1b[2J\x07\r\n\u202e\x9b[bold]<img src=x onerror=alert(1)>/../../etc/passwd"


def is_harmless(text):
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.fixture
def evil(tmp_path):
    """An adapter and two bases of no family, whose names, keys and metadata try everything."""
    folder = tmp_path / EVIL.replace("/", "_")
    folder.mkdir()
    base = {f"blocks.{i}.attn{EVIL}.weight": torch.randn(8, 8) for i in range(2)} | {
        "blocks.0.mlp.weight": torch.randn(8, 8)
    }
    for i in range(2):
        save_file({key: value + i / 10 for key, value in base.items()}, folder / f"{i}.safetensors", {EVIL: EVIL})
    adapter = {f"{EVIL}.nothing": torch.ones(1), f"unet.blocks.0.{EVIL}.lora_up.weight": torch.ones(8, 1)}
    for module in (*base, f"elsewhere{EVIL}"):
        module = f"unet.{module.removesuffix('.weight')}"
        adapter |= {f"{module}.lora_up.weight": torch.randn(8, 2), f"{module}.lora_down.weight": torch.randn(2, 8)}
    save_file(adapter, folder / "a.safetensors", {"base_family": EVIL, EVIL: EVIL, "ss_output_name": EVIL})
    return folder


@pytest.mark.slow
def test_nothing_in_a_name_reaches_the_screen(evil, tmp_path):
    a, s, t = (evil / f"{name}.safetensors" for name in "a01")
    out = tmp_path / "out"
    out.mkdir()
    bases = ["--source", s, "--target", t]
    commands = [
        (0, "inspect", a), (0, "inspect", a, "--json"), (0, "inspect", s), (0, "inspect", s, "--json"),
        (0, "similarity", s, t, "--layers", "all", "--json", out / "s.json", "--png", out / "s.png",
            "--html", out / "s.html"),
        (0, "migrate", evil, *bases, "-o", out / "library", "--workers", "1", "--report", out / "m.json"),
        (0, "transfer", a, *bases, "-o", out / "m", "--report", out / "r.json", "--png", out / "r.png",
            "--html", out / "r.html", "--save-assignment", out / "pairs.json"),
        (0, "convert", a, "--to", "lora-x", "--source", s, "-o", out / "x", "--rank", "4"),
        (0, "convert", a, "--to", "lora", "-o", out / "l"),
        (0, "cache", "info"), (0, "cache", "verify"), (0, "cache", "clear"),
        (1, "transfer", a, *bases, "-o", out / "m", "--strict"),
        (1, "transfer", a, *bases, "-o", evil / "no" / EVIL), (1, "inspect", evil), (1, "inspect", evil / "nowhere"),
        (1, "transfer", a, *bases, "-o", out / "m", "--assignment", evil / "nowhere"),
        (1, "similarity", s, t, "--rank", EVIL), (2, "inspect", a, evil), (2, "convert", a, "--to", EVIL), (2, EVIL),
        (2, "inspect", a, f"--{EVIL}"),
    ]  # fmt: skip
    words = [[status, [*map(str, words)]] for status, *words in commands]
    environment = os.environ | {"LORAX_CACHE": str(evil / "cache"), "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(words)], env=environment, capture_output=True, cwd=ROOT, check=False
    )
    shown = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == 0, shown[-3000:]
    assert shown.count("=== ") == len(commands)
    assert "onerror" in shown  # the names were shown
    # Of what is wrong usage typer shows the user's own words; it escapes what a terminal would obey.
    for part in shown.replace("\u202e", "").split("=== "):
        assert is_harmless(part), part
    assert shown.count("\u202e") <= 4
    for name in ("s.html", "r.html"):
        text = (out / name).read_text()
        assert is_harmless(text)
        assert "onerror" in text
        assert "<img" not in text
    for name in ("s.json", "r.json", "m.json", "pairs.json"):
        text = (out / name).read_text()
        assert is_harmless(text)
        assert "onerror" in text or name == "pairs.json"
    for name in ("s.png", "r.png"):
        with Image.open(out / name) as image:
            assert image.width > 100


def test_pictures_of_names_that_try_things(evil):
    source, target = (open_base(evil / f"{i}.safetensors") for i in range(2))
    adapter = load_adapter(evil / "a.safetensors", source)
    _, report = transfer_adapter(adapter, source, target, TransferOptions(threshold=-1))
    assert retained_picture(report).width > 100
    result = compare_bases(source, target, attention_only=False)
    assert png(result)
    assert json.loads(json.dumps(similarity_json(result)))["kinds"]


def opened_by(work):
    """Return the files that a call opens to read or write, by what the interpreter tells."""
    files = []

    def told(event, arguments):
        if event == "open" and isinstance(arguments[0], str | bytes) and listening:
            files.append(os.fsdecode(arguments[0]))

    listening = True
    sys.addaudithook(told)
    work()
    listening = False
    return files


def test_no_path_from_a_file_is_opened(tmp_path, pair):
    path, secret = tmp_path / "adapter_model.safetensors", tmp_path / "secret.json"
    secret.write_text("{}")
    names = {
        key: str(secret)
        for key in ("base_model_name_or_path", "ss_sd_model_name", "modelspec.thumbnail", "base_family")
    }
    save_file(
        {f"{seeds.PEFT}.lora_A.weight": torch.ones(2, 32), f"{seeds.PEFT}.lora_B.weight": torch.ones(32, 2)},
        path,
        names,
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "parent_library": str(secret), **names}))
    files = opened_by(lambda: (describe(path), transfer_adapter(load_adapter(path, pair[0]), *pair)))
    own = {str(path), str(tmp_path / "adapter_config.json"), *(str(base.files[0]) for base in pair)}
    assert str(path) in files
    assert {
        file for file in files if not file.endswith((".py", ".pyc", ".toml", ".json")) or str(tmp_path) in file
    } <= own


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    folder = seeds.base_folder(tmp_path / "model")
    outside = tmp_path / "outside.safetensors"
    save_file({"conv_in.weight": torch.zeros(32, 4, 3, 3)}, outside)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(
        json.dumps(
            {"weight_map": {"conv_in.weight": "../../outside.safetensors", "x": str(outside), "y": "/etc/passwd"}}
        )
    )

    def opened():
        with pytest.raises(FileError, match="index"):
            open_base(folder)

    files = opened_by(opened)
    assert {Path(file).name for file in files if str(tmp_path) in file} == {index.name}
    assert not [file for file in files if "passwd" in file]


@pytest.mark.parametrize("target", ["elsewhere/file", "elsewhere/nothing", "/nowhere/at/all"])
def test_an_output_that_is_a_link_is_replaced_and_not_followed(tmp_path, target):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("not ours")
    (tmp_path / "a.safetensors").write_bytes(seeds.adapters()["lora"])
    link = tmp_path / "out.safetensors"
    link.symlink_to(target)
    save_adapter(load_adapter(tmp_path / "a.safetensors"), link)
    assert not link.is_symlink()
    assert load_adapter(link).layers
    assert [(p.name, p.read_text()) for p in (tmp_path / "elsewhere").iterdir()] == [("file", "not ours")]
