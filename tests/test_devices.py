"""On each device everything gives what it gives on the CPU: transfers of each method and kind, comparison, training.

The CPU is the reference: its results are those that the other tests check against the formulas. The devices are CUDA,
where there is one, and one that knows no float64 and decomposes nothing (`tests/single.py`). What is moved may differ
by `TOLERANCE` of its size.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorax import (
    Cache,
    Engine,
    MismatchError,
    TransferOptions,
    compare_bases,
    convert_to_lora,
    convert_to_lora_x,
    load_adapter,
    module_base,
    open_base,
    transfer_adapter,
)
from lorax.adapters import Adapter, LoraLayer, expand
from lorax.compute.engine import or_on_cpu
from lorax.linalg import decompose, is_exact, leading_subspace, norm, polar, recompress, refactor
from lorax.migration.job import Task
from lorax.migration.work import move
from lorax.options import Method
from lorax.train import attach, train
from tests import every_kind as every
from tests import single
from tests.conftest import small_base
from tests.tensors import dense, randn, same, with_spectrum
from tests.trainable import data, made

pytestmark = pytest.mark.slow  # each computes twice

CPU = Engine()
# CUDA's products of float32 may round as those of float16 do (TF32); the other device rounds as float32 does.
TOLERANCE = {"cuda": 1e-3, single.NAME: 2e-5}
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
alone = pytest.mark.skipif(not single.is_possible, reason="this torch knows no devices made in Python")


@pytest.fixture(params=[pytest.param("cuda", marks=cuda), pytest.param(single.NAME, marks=alone)])
def device(request):
    if request.param == single.NAME:
        single.register()
    return request.param


@pytest.fixture
def engine(device):
    return Engine(device)


@pytest.fixture
def tolerance(device):
    return TOLERANCE[device]


@pytest.fixture(scope="module")
def wide(bases, tmp_path_factory):
    """A base of another width than the source's."""
    return small_base(tmp_path_factory.mktemp("wide") / "wide.safetensors", seed=5, model_channels=64)


@pytest.fixture(scope="module")
def loaded(bases, lora_file):
    """A sample of the layers: convolutions and projections of all sizes."""
    adapter = load_adapter(lora_file, bases[0])
    return replace(adapter, layers=dict(list(adapter.layers.items())[::5]))


def same_updates(ours: Adapter, cpus: Adapter, source, tolerance: float) -> None:
    """Assert equal layers and equal updates, which came back to the CPU."""
    assert list(ours.layers) == list(cpus.layers)
    assert ours.layers
    for name, own in ours.layers.items():
        (B, A), expected = expand(own, source), torch.mm(*expand(cpus.layers[name], source))
        assert {part.device.type for part in (B, A)} == {"cpu"}
        assert float((B @ A - expected).norm()) <= tolerance * float(expected.norm()), name


@pytest.mark.parametrize("method", list(map(str, Method)))
def test_each_method(bases, wide, loaded, method, engine, tolerance):
    targets = [wide] if method in ("align", "index") else [bases[1]]
    targets += [wide] if method == "auto" else []
    for target in targets:
        expected, on_cpu = transfer_adapter(loaded, bases[0], target, TransferOptions(method=method, rank=12))
        first, report = transfer_adapter(
            loaded, bases[0], target, TransferOptions(method=method, rank=12), engine=engine
        )
        again, _ = transfer_adapter(loaded, bases[0], target, TransferOptions(method=method, rank=12), engine=engine)
        same_updates(first, expected, target, tolerance)
        same_updates(again, first, target, 0.0)
        for ours, cpus in zip(report.rows, on_cpu.rows, strict=True):
            assert (ours.source, ours.target, ours.outcome) == (cpus.source, cpus.target, cpus.outcome)
            assert ours.retained_norm == pytest.approx(cpus.retained_norm, abs=tolerance, nan_ok=True)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return every.flux_bases(tmp_path_factory.mktemp("flux"))


@pytest.mark.parametrize(("is_fused", "method"), [(False, "auto"), (False, "project"), (True, "project")])
@pytest.mark.parametrize("kind", every.kinds(every.QKV))
def test_each_kind(flux, kind, is_fused, method, engine, tolerance):
    source, target = flux
    adapter = every.adapter_of(every.kinds(every.QKV if is_fused else source.layers[every.NAME])[kind])
    ours, cpus = (
        transfer_adapter(adapter, *flux, TransferOptions(method=method, rank=8), engine=e)[0].layers
        for e in (engine, CPU)
    )
    assert ours.keys() == cpus.keys()
    for name, own in ours.items():
        expected = dense(cpus[name], target)
        assert float((dense(own, target) - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)], ids=str)
def test_subspaces(shape, device, tolerance):
    weight = with_spectrum(*shape, [i**-0.5 for i in range(1, 301)]).float()
    for found in (decompose, leading_subspace):
        ours, cpus = (found(place, 100) for place in (weight.to(device), weight))
        assert {part.device.type for part in (ours.U, ours.S, ours.Vh)} == {device}
        same(ours.S.cpu(), cpus.S, limit=tolerance)
        for basis, known in ((ours.U.cpu(), cpus.U), (ours.Vh.cpu().T, cpus.Vh.T)):
            assert float((basis @ basis.T - known @ known.T).norm()) <= tolerance * 10


def test_products_of_factors(device, tolerance):
    B, A, thick = randn(90, 8), randn(8, 70), randn(90, 60)
    for work in (lambda place: recompress(B.to(place), A.to(place), 4), lambda place: refactor(thick.to(place), 9)):
        ours, expected = torch.mm(*work(device)).cpu(), torch.mm(*work("cpu"))
        assert float((ours - expected).norm()) <= tolerance * float(expected.norm())
    assert norm(B.to(device), A.to(device)) == pytest.approx(norm(B, A), rel=1e-6)
    same(polar(thick.to(device)).cpu(), polar(thick), limit=tolerance)


def test_the_fast_way(wide, device, tolerance):
    target = small_base(wide.files[0].with_name("fast.safetensors"), seed=5, change=0.2, model_channels=64)
    layers = {name: layer for name, layer in wide.layers.items() if min(layer.matrix_shape) == 128}
    adapter = every.adapter_of(
        *(LoraLayer(x, randn(x.shape[0], 4), randn(4, x.matrix_shape[1])) for x in layers.values())
    )
    found = [
        transfer_adapter(adapter, wide, target, TransferOptions(method="project", rank=12), engine=Engine(at))[0]
        for at in (device, "cpu")
    ]
    same_updates(*found, target, 10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_bases_of_other_dtypes(bases, loaded, tmp_path, dtype, engine, tolerance):
    save_file({k: v.to(dtype) for k, v in load_file(bases[1].files[0]).items()}, tmp_path / "t.safetensors")
    target = open_base(tmp_path / "t.safetensors")
    for method in ("orthogonal", "project"):
        found = [
            transfer_adapter(loaded, bases[0], target, TransferOptions(method=method, rank=12), engine=e)[0]
            for e in (engine, CPU)
        ]
        same_updates(*found, target, tolerance)


def scores(block, side):
    return getattr(block, side).phi.flatten().tolist()


def test_comparison(bases, wide, engine, tolerance):
    for target in (bases[1], wide):
        found = [compare_bases(bases[0], target, engine=e) for e in (engine, CPU)]
        for own, cpus in zip(*(found.kinds for found in found), strict=True):
            for side in ("left", "right"):
                assert scores(own, side) == pytest.approx(scores(cpus, side), abs=tolerance, nan_ok=True)


def test_conversion(bases, loaded, engine, tolerance):
    ours, cpus = (convert_to_lora_x(loaded, bases[0], rank=16, engine=e)[0] for e in (engine, CPU))
    same_updates(convert_to_lora(ours, bases[0]), convert_to_lora(cpus, bases[0]), bases[0], tolerance)


def test_a_cache_keeps_the_results_of_each_device_apart(bases, loaded, tmp_path, device):
    cache = Cache(tmp_path / "cache", 2**30)
    engines = (Engine(device, cache=cache), Engine(device, cache=cache), Engine(cache=cache), CPU)
    filling, cached, on_cpu, expected = (
        transfer_adapter(loaded, *bases, TransferOptions(method="project", rank=12), engine=engine)[0]
        for engine in engines
    )
    same_updates(cached, filling, bases[1], 0.0)
    same_updates(on_cpu, expected, bases[1], 0.0)


def test_training(tmp_path, device):
    def run(steps=12, **options):
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
        same(model(x, text), after, limit=1e-3)  # CUDA convolves in TF32
        return result.losses, adapter

    losses, whole = run()
    assert losses[-1] < losses[0]
    path = tmp_path / "training.safetensors"
    run(5, checkpoint=path)
    resumed, adapter = run(checkpoint=path, resume=True)
    assert resumed == losses
    assert all(torch.equal(own.delta, whole.layers[name].delta) for name, own in adapter.layers.items())


ERRORS = [
    RuntimeError("backend out of memory (allocated: 9 GB)\nTried to allocate more"),
    NotImplementedError("The operator 'aten::x' is not currently implemented for the device"),
    TypeError("Cannot convert a tensor to float64"),
    torch.cuda.OutOfMemoryError("out of memory"),
]


@pytest.fixture
def failing():
    """Break the device once, in the middle of its work."""
    single.register()
    assert not is_exact(torch.device(single.NAME))
    yield single.failures.append
    single.failures.clear()


@alone
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_where_a_device_fails_the_cpu_goes_on(bases, loaded, failing, error, caplog):
    failing(error)
    result, _ = or_on_cpu(
        lambda engine: transfer_adapter(loaded, *bases, TransferOptions(method="copy"), engine=engine),
        Engine(single.NAME),
    )
    same_updates(result, transfer_adapter(loaded, *bases, TransferOptions(method="copy"))[0], bases[1], 0.0)
    (line,) = caplog.messages
    assert line == f"single failed, the CPU does the work instead: {type(error).__name__}: " + str(error).split("\n")[0]
    assert not single.failures


class Cancelled(Exception):
    """As the host's."""


@alone
@pytest.mark.parametrize("error", [Cancelled(), KeyboardInterrupt(), MismatchError("a", "b", "c")], ids=repr)
def test_what_is_no_failure_of_the_device_is_not_tried_again(failing, error):
    engines: list[str] = []

    def work(engine):
        engines.append(engine.device)
        raise error

    with pytest.raises(type(error)):
        or_on_cpu(work, Engine(single.NAME))
    assert engines == [single.NAME]


@alone
def test_what_fails_on_the_cpu_too_is_raised(failing, caplog):
    def work(engine):
        raise ValueError("of the CPU") if engine.device == "cpu" else RuntimeError("of the device")

    with pytest.raises(ValueError, match="of the CPU"):
        or_on_cpu(work, Engine(single.NAME))
    assert len(caplog.messages) == 1


@alone
def test_a_migration_goes_on_where_a_device_fails(bases, lora_file, failing, tmp_path, caplog):
    source, target = (str(base.files[0]) for base in bases)
    tasks = [Task(str(lora_file), "a", f"{place}.safetensors", source, target) for place in ("cpu", "single")]
    for task, place in zip(tasks, ("cpu", single.NAME), strict=True):
        if place != "cpu":
            failing(RuntimeError("gone"))
        assert move(task, str(tmp_path), None, Engine(place)).status == "done"
    assert (tmp_path / "cpu.safetensors").read_bytes() == (tmp_path / "single.safetensors").read_bytes()
    assert len(caplog.messages) == 1


@alone
@pytest.mark.parametrize("fails", [False, True])
def test_commands_on_a_device(run, bases, lora_file, failing, fails, tmp_path, monkeypatch, caplog):
    source, target = (base.files[0] for base in bases)
    words = {
        "transfer": [lora_file, "--source", source, "--target", target, "-o", tmp_path / "t.safetensors"],
        "similarity": [source, target, "--json", tmp_path / "s.json", "--html", tmp_path / "s.html"],
        "convert": [lora_file, "--to", "lora-x", "--source", source, "-o", tmp_path / "x.safetensors"],
    }
    for command, given in words.items():
        made = [path for path in given if isinstance(path, Path) and path.parent == tmp_path]
        found, tensors = [], []
        for place in ("cpu", single.NAME):
            monkeypatch.setattr("lorax.cli._device", lambda _, place=place: place)
            if fails and place == single.NAME:
                failing(RuntimeError("gone"))
            run(command, *given, "--no-cache")
            found.append([path.read_bytes() for path in made])
            files = [load_file(path) for path in made if path.suffix == ".safetensors"]
            tensors.append({key: tensor for file in files for key, tensor in file.items()})
        if fails:
            assert found[0] == found[1]
        assert bool(tensors[0]) == (command != "similarity")
        for key, expected in tensors[0].items():
            same(tensors[1][key], expected, limit=TOLERANCE[single.NAME])
        assert len(caplog.messages) == fails
        caplog.clear()


@cuda
def test_the_command_line(run, bases, lora_file, tmp_path):
    files = [lora_file, "--source", bases[0].files[0], "--target", bases[1].files[0], "--no-cache"]
    for name, words in {"auto": [], "cuda": ["--device", "cuda"], "cpu": ["--device", "cpu"]}.items():
        run("transfer", *files, *words, "-o", tmp_path / f"{name}.safetensors", "--method", "project", "--rank", 12)
    auto, cuda, cpu = (load_adapter(tmp_path / f"{name}.safetensors", bases[1]) for name in ("auto", "cuda", "cpu"))
    same_updates(auto, cuda, bases[1], 0.0)
    same_updates(cuda, cpu, bases[1], TOLERANCE["cuda"])


@pytest.fixture
def full():
    """No room on the GPU."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@cuda
@pytest.mark.usefixtures("full")
def test_where_a_gpu_is_full_the_cpu_goes_on(run, bases, lora_file, tmp_path, caplog):
    files = [lora_file, "--source", bases[0].files[0], "--target", bases[1].files[0], "--no-cache"]
    run("transfer", *files, "-o", tmp_path / "gpu.safetensors")
    run("transfer", *files, "-o", tmp_path / "cpu.safetensors", "--device", "cpu")
    assert (tmp_path / "gpu.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()
    assert "OutOfMemoryError" in caplog.text
