"""The cache: what comes from it is what would be computed."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorax import Cache, Engine, FileError, TransferOptions, load_adapter, open_base, transfer_adapter
from lorax.adapters import expand
from lorax.adapters.convert import convert_to_lora_x
from lorax.compare.similarity import compare_bases
from lorax.compute.cache import KINDS
from lorax.compute.engine import machine
from lorax.linalg import decompose
from tests.conftest import small_base


def numbers(adapter):
    return {name: own.tensors() for name, own in adapter.layers.items()}


def equal(first, second):
    return first.keys() == second.keys() and all(
        parts.keys() == second[name].keys() and all(torch.equal(part, second[name][key]) for key, part in parts.items())
        for name, parts in first.items()
    )


def unreadable(base):
    """The same base, from whose files no weight comes."""

    def read(layer):
        raise AssertionError(f"{layer.name} was read")

    return replace(base, read=read)


@pytest.mark.slow
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("form", ["lora", "lora-x"])
@pytest.mark.parametrize("method", ["copy", "project", "index", "align", "subspace-null"])
def test_from_the_cache_comes_what_is_computed_and_no_weight_is_read(bases, lora_file, cache, method, form, fast):
    def moved(engine, *bases):
        options = TransferOptions(method=method, rank=20, format=form, fast=fast)
        return transfer_adapter(adapter, *bases, options, engine=engine)

    adapter = load_adapter(lora_file, bases[0])
    plain, report = moved(Engine(), *bases)
    for pair in (bases, [unreadable(base) for base in bases]):
        result, again = moved(Engine(cache=cache), *pair)
        assert equal(numbers(plain), numbers(result))
        assert report.to_json() == again.to_json()


@pytest.mark.parametrize("rank", [None, 20])
def test_scores_from_the_cache(bases, cache, rank):
    found = [
        compare_bases(*pair, rank=rank, attention_only=False, engine=Engine(cache=kept)).kinds
        for pair, kept in ((bases, None), (bases, cache), ([unreadable(base) for base in bases], cache))
    ]
    for kinds in found[1:]:
        for one, other in zip(found[0], kinds, strict=True):
            for side in ("left", "right"):  # NaN is equal to NaN here
                assert repr(getattr(one, side)) == repr(getattr(other, side))


def test_a_lora_x_is_expanded_from_the_cache(bases, lora_file, cache):
    adapter, _ = convert_to_lora_x(load_adapter(lora_file, bases[0]), bases[0], rank=20)
    name, own = next(iter(adapter.layers.items()))
    plain = expand(own, bases[0])
    expand(own, bases[0], Engine(cache=cache))
    base = unreadable(bases[0])
    base.digests[name] = bases[0].digest(name)
    assert all(map(torch.equal, plain, expand(own, base, Engine(cache=cache))))


def test_fast_takes_what_is_exact_and_exact_not_what_is_fast(tmp_path, cache):
    base = small_base(tmp_path / "base.safetensors")
    name = next(layer.name for layer in base.layers.values() if min(layer.matrix_shape) > 120)
    weight = base.weight(name)
    vector = torch.ones(weight.shape[0])
    engine = Engine(cache=cache)
    quick = engine.subspace(base, name, 40)
    assert not torch.equal(
        quick.U @ (quick.U.T @ vector), decompose(weight, 40).U @ (decompose(weight, 40).U.T @ vector)
    )
    assert torch.equal(engine.triplets(base, name, 40).U, decompose(weight, 40).U)
    assert torch.equal(engine.subspace(base, name, 40).U, decompose(weight, 40).U)
    assert torch.equal(engine.triplets(base, name, 50).U, decompose(weight, 50).U)


@pytest.mark.slow
def test_a_file_with_other_weights_under_the_same_name(tmp_path, lora_file, cache):
    target = small_base(tmp_path / "target.safetensors", change=0.2)
    source = small_base(tmp_path / "source.safetensors")
    adapter = load_adapter(lora_file, source)
    before, _ = transfer_adapter(
        adapter, source, target, TransferOptions(method="project", rank=20), engine=Engine(cache=cache)
    )
    target = small_base(tmp_path / "target.safetensors", change=0.3)
    after, _ = transfer_adapter(
        adapter, source, target, TransferOptions(method="project", rank=20), engine=Engine(cache=cache)
    )
    plain, _ = transfer_adapter(adapter, source, target, TransferOptions(method="project", rank=20))
    assert equal(numbers(after), numbers(plain))
    assert not equal(numbers(after), numbers(before))


def test_a_copy_of_a_base_needs_no_new_subspaces(tmp_path, bases, lora_file, cache):
    adapter = load_adapter(lora_file, bases[0])
    transfer_adapter(adapter, *bases, TransferOptions(method="project", rank=20), engine=Engine(cache=cache))
    entries = cache.info()["subspaces"]
    copy = tmp_path / "renamed.safetensors"
    copy.write_bytes(bases[1].files[0].read_bytes())
    transfer_adapter(
        adapter, bases[0], open_base(copy), TransferOptions(method="project", rank=20), engine=Engine(cache=cache)
    )
    assert cache.info()["subspaces"] == entries


def test_damaged_entries_are_computed_again_and_said_once(bases, lora_file, cache, caplog):
    adapter = load_adapter(lora_file, bases[0])
    plain, _ = transfer_adapter(adapter, *bases, TransferOptions(method="project", rank=20), engine=Engine(cache=cache))
    for path in cache.folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    with caplog.at_level(logging.WARNING):
        again, _ = transfer_adapter(
            adapter, *bases, TransferOptions(method="project", rank=20), engine=Engine(cache=cache)
        )
    assert equal(numbers(plain), numbers(again))
    assert sum("damaged" in record.message for record in caplog.records) == 1
    assert cache.verify().damaged == []


def test_a_folder_that_cannot_be_is_said_once(bases, lora_file, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache", 2**30)
    adapter = load_adapter(lora_file, bases[0])
    with caplog.at_level(logging.WARNING):
        result, _ = transfer_adapter(
            adapter, *bases, TransferOptions(method="project", rank=20), engine=Engine(cache=cache)
        )
    assert len(caplog.records) == 1
    plain, _ = transfer_adapter(adapter, *bases, TransferOptions(method="project", rank=20))
    assert equal(numbers(result), numbers(plain))


def test_a_base_whose_file_is_gone(tmp_path, lora_file, bases, cache):
    base = small_base(tmp_path / "gone.safetensors")
    base.files[0].unlink()
    with pytest.raises(FileError, match=r"gone\.safetensors"):
        transfer_adapter(load_adapter(lora_file, bases[0]), base, bases[1], engine=Engine(cache=cache))


def test_the_next_weight_is_read_ahead_in_order(bases):
    names = list(bases[0].layers)
    for name, weight in zip(names, Engine().weights(bases[0], names), strict=True):
        assert torch.equal(weight, bases[0].weight(name))
    assert list(Engine().weights(bases[0], [])) == []


def test_kinds_are_all_there_is(bases, lora_file, cache):
    transfer_adapter(
        load_adapter(lora_file, bases[0]),
        *bases,
        TransferOptions(method="project", rank=20),
        engine=Engine(cache=cache),
    )
    assert sorted(path.name for path in Path(cache.folder).iterdir()) == sorted(KINDS)


@pytest.mark.slow
def test_unlike_machines_share_no_results(monkeypatch):
    """Another instruction set, as torch's own switch has it; another processor of the same; other settings."""
    words = [sys.executable, "-c", "from lorax import Engine; print(Engine().version)"]
    switch = {"ATEN_CPU_CAPABILITY": "default"}
    told = subprocess.run(words, env=os.environ | switch, check=True, capture_output=True, text=True).stdout
    versions = [Engine().version]
    assert told.strip() != repr(versions[0])
    text = Path("/proc/cpuinfo").read_text()
    machine.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text.replace("MHz\t\t: ", "MHz\t\t: 1"))
    assert Engine().version == versions[0]  # it may be slower today
    for change in ("model name\t: Another\n", "CPU part\t: 0xd0c\n"):
        machine.cache_clear()
        monkeypatch.setattr(Path, "read_text", lambda *_, change=change, **__: text + change)
        versions.append(Engine().version)
    monkeypatch.undo()
    machine.cache_clear()
    assert Engine().version == versions[0]
    assert len(set(versions)) == 3
