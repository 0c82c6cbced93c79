"""Limits: what is larger than any model is refused at once, and what is large costs what the file costs."""

import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from lorax import FileError, FormatError, TransferOptions, load_adapter, open_base, transfer_adapter
from lorax.adapters.layer import RANK, WEIGHT
from lorax.files.tensorfile import DIMENSIONS, HEADER_BYTES, NAME_CHARACTERS, NUMBERS, TENSORS, TensorFile
from lorax.inspect import DENSE, describe
from reliability import seeds
from reliability.readers import Tally
from tests.commands import ROOT

UP, DOWN = f"lora_unet_{seeds.QUERY}.lora_up.weight", f"lora_unet_{seeds.QUERY}.lora_down.weight"


def header(entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(shape, place=0, size=0):
    return {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}


TWICE = b'{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
LIMITS = {
    "header": ((HEADER_BYTES + 1).to_bytes(8, "little") + b"{" + b" " * HEADER_BYTES, "header is too large"),
    "tensors": (header({f"{i}.diff": entry([0]) for i in range(TENSORS + 1)}), f"more than {TENSORS} tensors"),
    "many tensors": (header({f"{i}.diff": entry([0]) for i in range(3 * TENSORS)}), f"more than {TENSORS + 2} objects"),
    "name": (header({"x" * (NAME_CHARACTERS + 1) + ".diff": entry([0])}), f"more than {NAME_CHARACTERS} characters"),
    "name of 10 MB": (header({"9" * 10**7: entry([0])}), f"more than {NAME_CHARACTERS} characters"),
    "dimensions": (header({"x.diff": entry([0] * (DIMENSIONS + 1))}), f"more than {DIMENSIONS} dimensions"),
    "dimensions, very many": (header({"x.diff": entry([1] * 10**5, size=4)}) + bytes(4), "dimensions"),
    "numbers": (header({"x.diff": entry([0, NUMBERS + 1])}), "larger than any model"),
    "numbers that overflow": (header({"x.diff": entry([0, 2**62, 2**62])}), "larger than any model|damaged"),
    "nesting": (b"\x10\x27\0\0\0\0\0\0" + b'{"a":' * 2000, "nested too deep"),
    "a name twice": (
        len(TWICE).to_bytes(8, "little") + TWICE, "a name twice"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("read", [TensorFile, load_adapter, open_base, describe])
@pytest.mark.parametrize(("content", "words"), LIMITS.values(), ids=LIMITS)
def test_limits_of_a_file(tmp_path, content, words, read):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(FileError, match=words) as caught:
        read(path)
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 1000


def test_a_file_at_the_limits_is_read(tmp_path):
    """As many tensors as there may be, with the longest names; an adapter of a hundred times the usual size."""
    names = [f"{i:06}.{'x' * 200}.diff" for i in range(TENSORS)]
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        header({name: entry([1], 0, 4) if not i else entry([0], 4) for i, name in enumerate(names)}) + bytes(4)
    )
    assert len(TensorFile(path).entries) == TENSORS


SIDE = int(WEIGHT**0.5) + 1
HADAMARD = {f"hada_w{i}_{s}": (SIDE, 1) if s == "a" else (1, SIDE) for i in "12" for s in "ab"}
TUCKER = {"lora_up.weight": (1, 1000), "lora_down.weight": (1000, 20_000, 1, 1), "lora_mid.weight": (1000, 1000, 8, 8)}
TOO_LARGE = {
    "rank of a LoRA": ("rank", {"lora_up.weight": (2, RANK + 1), "lora_down.weight": (RANK + 1, 2)}),
    "rank of a FouRA": (
        "rank", {"foura_up.weight": (2, RANK + 1), "foura_down.weight": (RANK + 1, 2), "foura_gate": (RANK + 1,)}),
    "rank of a LoKr": ("rank", {"lokr_w1": (1, 1), "lokr_w2_a": (2, RANK + 1), "lokr_w2_b": (RANK + 1, 2)}),
    "weight of a LoRA": ("larger than any", {"lora_up.weight": (SIDE, 1), "lora_down.weight": (1, SIDE)}),
    "weight of a LoKr": ("larger than any", {"lokr_w1": (SIDE, 1), "lokr_w2": (1, SIDE)}),
    "weight of a LoHa": ("larger than any", HADAMARD),
    "middle of a LoRA": ("lora_mid", TUCKER),
}  # fmt: skip


@pytest.mark.parametrize(("words", "shapes"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_limits_of_a_layer(tmp_path, words, shapes):
    path = tmp_path / "a.safetensors"
    save_file({f"lora_unet_x.{name}": torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}, path)
    with pytest.raises(FormatError, match=words):
        load_adapter(path)
    with pytest.raises(FormatError):
        describe(path)


def test_a_rank_above_its_layer_costs_what_the_file_costs(tmp_path, pair):
    """A Gram matrix of the rank would take 2 GB."""
    path = tmp_path / "a.safetensors"
    up, down = torch.randn(32, RANK) / 100, torch.randn(RANK, 32) / 100
    save_file({UP: up, DOWN: down}, path)
    adapter = load_adapter(path, pair[0])
    (layer,) = adapter.layers.values()
    assert layer.norm() == pytest.approx(float((up.double() @ down.double()).norm()), rel=1e-5)
    tally = Tally()
    for work in (
        lambda: describe(path),
        lambda: transfer_adapter(adapter, *pair, TransferOptions(method="project", rank=8)),
    ):
        assert tally.call(work)
    tally.check()


def test_a_bomb_is_not_unfolded_to_be_described(tmp_path):
    """A small file stands for a dense update of more numbers than are worth their norm."""
    side = int(DENSE**0.5) + 1
    save_file(_loha(side), tmp_path / "a.safetensors")
    start = time.process_time()
    facts = describe(tmp_path / "a.safetensors")
    assert facts["norm"] is None
    assert facts["rows"][0]["shape"] == [side, side]
    assert time.process_time() - start < 1


@pytest.mark.slow
def test_the_largest_that_is_unfolded_fits_the_memory(tmp_path):
    side = int(DENSE**0.5)
    save_file(_loha(side), tmp_path / "a.safetensors")
    program = "import sys, lorax.inspect as i; print(i.describe(sys.argv[1])['norm']); "
    program += "from benchmarks.memory import peak; print(peak())"
    command = [sys.executable, "-c", program, tmp_path / "a.safetensors"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    norm, peak = map(float, told.stdout.split())
    assert norm == pytest.approx(side, rel=1e-6)
    assert peak < 1.3 * 2**30  # torch itself, and three matrices of float32


def _loha(side):
    shapes = {"a": (side, 1), "b": (1, side)}
    return {f"lora_unet_x.hada_w{i}_{s}": torch.ones(shapes[s]) for i in "12" for s in "ab"}


@pytest.mark.slow
def test_time_grows_with_the_tensors_and_no_faster(tmp_path):
    """Modules of no family, more than any adapter has: four times as many take four times as long, not sixteen."""

    def seconds(count):
        tensors = {f"lora_unet_thing_{i}_x.diff": torch.ones(1, 1) for i in range(count)}
        save_file(tensors, tmp_path / "a.safetensors")
        start = time.process_time()
        assert len(load_adapter(tmp_path / "a.safetensors").layers) == count
        return time.process_time() - start

    seconds(100)  # imports, first use
    few, many = seconds(2_500), seconds(10_000)
    assert many < 8 * few, (few, many)
