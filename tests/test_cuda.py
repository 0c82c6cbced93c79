"""On a GPU everything gives what it gives on the CPU: transfers of each method and kind, comparison, training.

The CPU is the reference: its results are those that the other tests check against the formulas.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.test_kinds_transfer as every
from lorax import (
    Cache,
    Engine,
    compare_bases,
    convert_to_lora,
    convert_to_lora_x,
    load_adapter,
    module_base,
    open_base,
    transfer_adapter,
)
from lorax.adapters import Adapter, expand
from lorax.options import METHODS
from lorax.train import attach, train
from tests.conftest import small_base
from tests.test_train import data, made

DEVICE = "cuda"
CUDA, CPU = Engine(DEVICE), Engine()

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def wide(bases, tmp_path_factory):
    """A base of another width than the source's."""
    return small_base(tmp_path_factory.mktemp("wide") / "wide.safetensors", seed=5, model_channels=64)


@pytest.fixture(scope="module")
def loaded(bases, lora_file):
    return load_adapter(lora_file, bases[0])


def same(ours: Adapter, cpus: Adapter, source, tolerance: float = 1e-3) -> None:
    """Assert equal layers and equal updates, which came back to the CPU."""
    assert list(ours.layers) == list(cpus.layers)
    assert ours.layers
    for name, own in ours.layers.items():
        (B, A), expected = expand(own, source), torch.mm(*expand(cpus.layers[name], source))
        assert {part.device.type for part in (B, A)} == {"cpu"}
        assert float((B @ A - expected).norm()) <= tolerance * float(expected.norm()), name


@pytest.mark.parametrize("method", METHODS)
def test_each_method(bases, wide, loaded, method):
    targets = [wide] if method in ("align", "index") else [bases[1]]
    targets += [wide] if method == "auto" else []
    for target in targets:
        expected, on_cpu = transfer_adapter(loaded, bases[0], target, method=method, rank=12)
        first, report = transfer_adapter(loaded, bases[0], target, method=method, rank=12, engine=CUDA)
        again, _ = transfer_adapter(loaded, bases[0], target, method=method, rank=12, engine=CUDA)
        same(first, expected, target)
        same(again, first, target, 0.0)
        for ours, cpus in zip(report.rows, on_cpu.rows, strict=True):
            assert (ours.source, ours.target, ours.outcome) == (cpus.source, cpus.target, cpus.outcome)
            assert ours.retained_energy == pytest.approx(cpus.retained_energy, abs=1e-3, nan_ok=True)


flux = every.bases


@pytest.mark.parametrize(("is_fused", "method"), [(False, "auto"), (False, "project"), (True, "project")])
@pytest.mark.parametrize("kind", every.kinds(every.QKV))
def test_each_kind(flux, kind, is_fused, method):
    source, target = flux
    adapter = every.adapter_of(every.kinds(every.QKV if is_fused else source.layers[every.NAME])[kind])
    ours, cpus = (transfer_adapter(adapter, *flux, method=method, rank=8, engine=e)[0].layers for e in (CUDA, CPU))
    assert ours.keys() == cpus.keys()
    for name, own in ours.items():
        expected = every.dense(cpus[name], target)
        torch.testing.assert_close(every.dense(own, target), expected, rtol=1e-3, atol=1e-5)


def test_the_fast_way(bases, loaded):
    exact, _ = transfer_adapter(loaded, *bases, method="project", rank=12, engine=CUDA)
    fast, _ = transfer_adapter(loaded, *bases, method="project", rank=12, engine=Engine(DEVICE, fast=True))
    same(fast, exact, bases[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_bases_of_few_bits(bases, loaded, tmp_path, dtype):
    save_file({k: v.to(dtype) for k, v in load_file(bases[1].files[0]).items()}, tmp_path / "t.safetensors")
    target = open_base(tmp_path / "t.safetensors")
    for method in ("orthogonal", "project"):
        found = [transfer_adapter(loaded, bases[0], target, method=method, rank=12, engine=e)[0] for e in (CUDA, CPU)]
        same(*found, target)


def scores(block, side):
    return [score.phi for line in getattr(block, side) for score in line]


def test_comparison(bases, wide):
    for target in (bases[1], wide):
        found = [compare_bases(bases[0], target, engine=e) for e in (CUDA, CPU)]
        for own, cpus in zip(*(found.kinds for found in found), strict=True):
            for side in ("left", "right"):
                assert scores(own, side) == pytest.approx(scores(cpus, side), abs=1e-4, nan_ok=True)


def test_conversion(bases, loaded):
    ours, cpus = (convert_to_lora_x(loaded, bases[0], rank=16, engine=e)[0] for e in (CUDA, CPU))
    same(convert_to_lora(ours, bases[0]), convert_to_lora(cpus, bases[0]), bases[0])


def test_a_cache_keeps_the_results_of_each_device_apart(bases, loaded, tmp_path):
    cache = Cache(tmp_path / "cache", 2**30)
    engines = (Engine(DEVICE, cache=cache), Engine(DEVICE, cache=cache), Engine(cache=cache), CPU)
    filling, cached, on_cpu, expected = (
        transfer_adapter(loaded, *bases, method="project", rank=12, engine=engine)[0] for engine in engines
    )
    same(cached, filling, bases[1], 0.0)
    same(on_cpu, expected, bases[1], 0.0)


def test_training(tmp_path):
    def run(device, steps=12, **options):
        model, (x, text, y) = made().to(device), (part.to(device) for part in data())
        with attach(model, rank=8) as layers:

            def loss(call):
                return (model(x + 0.1 * torch.randn_like(x), text) - y).square().mean()

            result = train(layers, loss, steps, learning_rate=0.03, seed=0, **options)
            after = model(x, text)
        adapter, base = layers.adapter(), module_base(model)
        assert {own.delta.device.type for own in adapter.layers.values()} == {"cpu"}
        modules = dict(model.named_modules())
        with torch.no_grad():
            for name, own in adapter.layers.items():
                modules[name.removeprefix("transformer.")].weight += torch.mm(*expand(own, base)).to(device)
        torch.testing.assert_close(model(x, text), after, rtol=1e-3, atol=1e-4)
        return result.losses, adapter

    losses, whole = run(DEVICE)
    assert losses[-1] < losses[0]
    path = tmp_path / "training.safetensors"
    run(DEVICE, 5, checkpoint=path)
    resumed, adapter = run(DEVICE, checkpoint=path, resume=True)
    assert resumed == losses
    assert all(torch.equal(own.delta, whole.layers[name].delta) for name, own in adapter.layers.items())


def test_the_command_line(run, bases, lora_file, tmp_path):
    files = [lora_file, "--source", bases[0].files[0], "--target", bases[1].files[0], "--no-cache"]
    for name, words in {"auto": [], "cuda": ["--device", "cuda"], "cpu": ["--device", "cpu"]}.items():
        run("transfer", *files, *words, "-o", tmp_path / f"{name}.safetensors", "--method", "project", "--rank", 12)
    auto, cuda, cpu = (load_adapter(tmp_path / f"{name}.safetensors", bases[1]) for name in ("auto", "cuda", "cpu"))
    same(auto, cuda, bases[1], 0.0)
    same(cuda, cpu, bases[1])


@pytest.fixture
def full():
    """No room on the GPU."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("full")
def test_a_full_gpu_is_said(run, bases, lora_file, tmp_path):
    files = [lora_file, "--source", bases[0].files[0], "--target", bases[1].files[0], "--no-cache"]
    _, told = run("transfer", *files, "-o", tmp_path / "out.safetensors", status=1)
    assert "--device cpu" in told
    assert not (tmp_path / "out.safetensors").exists()
