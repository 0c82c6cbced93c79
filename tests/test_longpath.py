"""Paths of more than 260 characters on Windows: by Python's own rules for its paths, and on a disk that acts so."""

import ntpath
import os
import types
from pathlib import Path, PureWindowsPath

import pytest
import torch
from safetensors.torch import save

from lorax import Cache, OutputError, load_adapter, open_base, save_adapter
from lorax.files import longpath
from lorax.files.longpath import on_disk
from lorax.files.output import check_output, make_folder, write_bytes
from lorax.files.tensorfile import file_state
from lorax.inspect import describe
from reliability import seeds

FOLDER = "C:\\" + "\\".join(["x" * 60] * 4)  # 246 characters
SHARE = "\\\\server\\share\\" + "x" * 240


@pytest.mark.parametrize(
    ("path", "form"),
    [
        (f"{FOLDER}\\a", f"\\\\?\\{FOLDER}\\a"),
        (f"{FOLDER}/b/./../a", f"\\\\?\\{FOLDER}\\a"),
        (f"{FOLDER}\\\U0001f600", f"\\\\?\\{FOLDER}\\\U0001f600"),
        (SHARE, f"\\\\?\\UNC{SHARE[1:]}"),
        (FOLDER, FOLDER),
        ("C:\\models\\a", "C:\\models\\a"),
        ("models/a", "models/a"),
        (f"\\\\?\\{FOLDER}\\a", f"\\\\?\\{FOLDER}\\a"),
        (f"\\\\.\\{FOLDER}\\a", f"\\\\.\\{FOLDER}\\a"),
    ],
)
def test_the_form_of_a_long_path(monkeypatch, path, form):
    monkeypatch.setattr(longpath, "WINDOWS", True)
    assert str(on_disk(path)) == form
    assert str(on_disk(on_disk(path))) == form
    if form != path:
        assert str(PureWindowsPath(form)) == form
        assert PureWindowsPath(form).is_absolute()
        assert ntpath.normpath(form) == form


def test_what_counts(monkeypatch):
    """Units of UTF-16, and what is put below a folder."""
    monkeypatch.setattr(longpath, "WINDOWS", True)
    assert str(on_disk(FOLDER[:-1] + "\U0001f600")).startswith("C:")
    assert str(on_disk(FOLDER + "\U0001f600")).startswith("\\\\?\\")
    assert str(on_disk(FOLDER, room=1)).startswith("C:")
    assert str(on_disk(FOLDER, room=2)).startswith("\\\\?\\")


def test_a_long_relative_path(monkeypatch, tmp_path):
    monkeypatch.setattr(longpath, "WINDOWS", True)
    monkeypatch.setattr(os, "getcwd", lambda: FOLDER)
    assert str(on_disk("a")) == f"\\\\?\\{FOLDER}\\a"


def test_other_systems_keep_their_paths():
    assert on_disk(FOLDER * 2) == Path(FOLDER * 2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    r"""A folder that is there by its long form alone: what begins with `\\?\` lies on a disk of its own."""
    place = Path("\\\\?\\" + str(tmp_path))
    monkeypatch.chdir(tmp_path)
    place.mkdir(parents=True)

    def whole(path):
        return str(path) if str(path).startswith("\\\\?\\") else os.path.abspath(path)

    monkeypatch.setattr(longpath, "ntpath", types.SimpleNamespace(abspath=whole))
    monkeypatch.setattr(longpath, "WINDOWS", True)
    long = tmp_path / ("x" * 240)
    make_folder(long)
    assert os.listdir(place) == [long.name]
    assert not long.exists()
    return long


def test_outputs(folder):
    out = folder / "a"
    assert check_output(out, []) == out
    write_bytes(out, b"old")
    assert check_output(out, []) == out
    assert file_state(out)[0] == 3
    with pytest.raises(OutputError, match="one of the inputs"):
        check_output(out, [out])
    with pytest.raises(OutputError, match="File exists"):
        write_bytes(out, b"new", overwrite=False)
    write_bytes(out, b"new")
    write_bytes(folder / "b", b"new", overwrite=False)
    make_folder(folder / "c" / "d")
    with pytest.raises(OutputError, match="a folder"):
        check_output(folder / "c", [])
    assert on_disk(out).read_bytes() == b"new"
    assert sorted(os.listdir(on_disk(folder))) == ["a", "b", "c"]
    assert sorted(os.listdir(on_disk(folder / "c"))) == ["d"]


def test_adapters(folder):
    tensors = {f"{seeds.PEFT}.lora_A.weight": torch.ones(2, 32), f"{seeds.PEFT}.lora_B.weight": torch.ones(32, 2)}
    for name in ("a.safetensors", "adapter_model.safetensors"):
        write_bytes(folder / name, save(tensors))
    write_bytes(folder / "adapter_config.json", b'{"lora_alpha": 64, "r": 2}')
    plain, scaled = load_adapter(folder / "a.safetensors"), load_adapter(folder / "adapter_model.safetensors")
    for name, own in plain.layers.items():
        assert scaled.layers[name].norm() == pytest.approx(32 * own.norm())
    save_adapter(plain, folder / "out.safetensors", inputs=[folder / "a.safetensors"])
    assert load_adapter(folder / "out.safetensors").layers.keys() == plain.layers.keys()
    assert describe(folder / "out.safetensors")["kind"] == "adapter"


def test_bases(folder, tmp_path):
    short = seeds.base_folder(tmp_path / "short")
    make_folder(folder / "unet")
    for file in (short / "unet").iterdir():
        write_bytes(folder / "unet" / file.name, file.read_bytes())
    for path in (folder, folder / "unet", folder / "unet" / seeds.shard(2)):
        base = open_base(path)
        assert base.name == path.name
        assert base.identity() == open_base(short).identity()


def test_the_cache_lets_go_of_its_oldest_entries(folder):
    cache = Cache(folder, 1000)
    for number in range(9):
        cache.write(bytes(200), "scores", number)
    assert cache.read("scores", 8) == bytes(200)
    assert cache.read("scores", 0) is None
    assert cache.info()["scores"]["entries"] < 5
    assert cache.verify().sound == cache.clear()
    assert cache.info() == {}
