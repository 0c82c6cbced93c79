import json
import os
import signal
import subprocess
import sys

# Small tensors: threads that wait for each other cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

import lorax
from demo.synthetic import base_tensors
from lorax import Adapter, Base, Cache, TransferOptions, cli, load_adapter, open_base, save_adapter, transfer_adapter
from lorax.entry import ENDINGS
from lorax.migration import Task, plan_folder
from lorax.models.families import families
from lorax.models.family import Family
from lorax.models.unet import UNetConfig
from reliability import seeds
from tests.library import BROKEN, contents
from tests.tensors import lora_tensors

# In CI the same examples every time; on a developer's machine new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

SMALL = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    transformer_depth=(1, 1),
    transformer_depth_middle=1,
    context_dim=768,
)
# The user's own cache is none of the tests' business.
os.environ["LORAX_CACHE"] = "off"

REPORT_SCHEMA = json.loads((Path(lorax.__file__).parent / "transfer/report.schema.json").read_text())
SHARED = Path(os.environ.get("LORAX_SHARED", Path(__file__).parents[2] / "shared"))


def small_family(**unet: object) -> Family:
    """SD 1.x with a narrow U-Net and a text encoder of two layers."""
    family = families()["sd1"]
    encoders = tuple(replace(encoder, width=64, inner=256, depth=2) for encoder in family.text_encoders)
    return replace(family, unet=replace(SMALL, **unet), text_encoders=encoders)


def small_base(path: Path, seed: int = 1, change: float = 0.0, text: bool = True, **unet: object) -> Base:
    tensors = base_tensors(small_family(**unet), seed, change=change, dtype=torch.float32, text_encoders=text)
    save_file(tensors, path)
    return open_base(path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """The command line in this process: what it printed, and its errors."""

    def call(*words: object, status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["lorax", *map(str, words)])
        handlers = {number: signal.getsignal(number) for number in ENDINGS}
        try:
            with pytest.raises(SystemExit) as left:
                cli.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        printed = capsys.readouterr()
        assert (left.value.code or 0) == status, printed.err
        assert "Traceback" not in printed.err
        return printed.out, printed.err

    return call


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Base]:
    folder = tmp_path_factory.mktemp("bases")
    return small_base(folder / "source.safetensors"), small_base(folder / "target.safetensors", change=0.2)


@pytest.fixture(scope="session")
def lora_file(bases: tuple[Base, Base], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "style.safetensors"
    save_file(lora_tensors(bases[0]), path, {"ss_tag_frequency": "kept"})
    return path


@pytest.fixture
def lora(bases: tuple[Base, Base], lora_file: Path) -> Adapter:
    return load_adapter(lora_file, bases[0])


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    """The bases of the seeds of hostile files."""
    folder = tmp_path_factory.mktemp("pair")
    return [open_base(seeds.base_file(folder / f"{i}.safetensors", change=0.2 * i)) for i in range(2)]


@pytest.fixture(scope="session")
def published() -> list[Path]:
    files = sorted((SHARED / "data" / "loras").glob("*.safetensors"))
    if not files:
        pytest.skip(f"the published LoRA files are not at {SHARED} (set LORAX_SHARED)")
    return files


@pytest.fixture(scope="session")
def library(bases: tuple[Base, Base], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of several ranks in several folders, and files that are none."""
    folder = tmp_path_factory.mktemp("library")
    for i, (name, rank) in enumerate((("a", 4), ("b", 8), ("styles/a", 2), ("styles/deep/c", 16), ("d é", 1))):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(lora_tensors(bases[0], rank, seed=i), path, {"ss_tag_frequency": name})
    (folder / "broken").mkdir()
    (folder / "broken" / "cut.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:-100])
    (folder / "broken" / "text.safetensors").write_text("not an adapter")
    save_file({"unet.x.weight": torch.zeros(2, 2)}, folder / "broken" / "base.safetensors")
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 2**30)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tasks(library: Path, bases: tuple[Base, Base], own_cache: None) -> list[Task]:
    return plan_folder(library, bases[0].files[0], bases[1].files[0], TransferOptions(method="project", rank=20))


@pytest.fixture
def expected(library: Path, bases: tuple[Base, Base], tmp_path: Path, own_cache: None) -> dict[str, bytes]:
    """What the transfer of each file by itself gives."""
    folder = tmp_path / "expected"
    for path in sorted(library.rglob("*.safetensors")):
        name = path.relative_to(library)
        if name.as_posix() not in BROKEN:
            adapter = load_adapter(path, bases[0])
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_adapter(
                transfer_adapter(adapter, *bases, TransferOptions(method="project", rank=20))[0], folder / name
            )
    return contents(folder)


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Makes 1,500 folders below one, more than calls can be, and removes them as nobody else would."""

    def make(folder: Path) -> Path:
        for _ in range(15):  # `makedirs` calls itself
            folder /= "/".join("d" * 100)
            folder.mkdir(parents=True)
        return folder

    yield make
    subprocess.run(["rm", "-rf", tmp_path], check=True)
