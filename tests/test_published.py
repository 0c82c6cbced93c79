"""The main job on real input: published LoRA files, moved between two full-size SD 1.5-shaped bases in fp16.

Two bases of 860 M parameters are made. The reference is a full SVD in float64, two seconds a layer: of a sample of the
layers, and of all of them where all is asked for.
"""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from demo.synthetic import base_tensors
from lorax import Cache, Engine, Outcome, TransferOptions, load_adapter, open_base, save_adapter, transfer_adapter
from lorax.models.families import families
from tests.tensors import same

pytestmark = pytest.mark.slow  # bases of full size are made


@pytest.fixture(scope="module", autouse=True)
def all_threads():
    """Here the matrices are large."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    for name, change in (("source", 0.0), ("target", 0.1)):
        save_file(base_tensors(families()["sd1"], 1, change=change), folder / f"{name}.safetensors")
    yield open_base(folder / "source.safetensors"), open_base(folder / "target.safetensors")
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("step", [24, pytest.param(1, marks=pytest.mark.whole)])
def test_transfer_equals_the_published_formula_in_float64(full_size, published, tmp_path, step):
    source, target = full_size
    given = {path.name: load_adapter(path, source) for path in published}
    assert [len(adapter.layers) for adapter in given.values()] == [192, 192]
    names = sorted(given[published[0].name].layers)[::step]
    given = {
        file: replace(adapter, layers={name: adapter.layers[name] for name in names}) for file, adapter in given.items()
    }
    moved = {}
    engine = Engine(cache=Cache(tmp_path / "cache", 2**32))  # each weight is decomposed once for the four
    for file, adapter in given.items():
        for dtype in ("float32", "keep"):
            result, report = transfer_adapter(
                adapter, source, target, TransferOptions(method="project", rank=320, dtype=dtype), engine=engine
            )
            assert report.outcomes == {Outcome.TRANSFERRED: len(names)}
            save_adapter(result, tmp_path / "out.safetensors")
            moved[file, dtype] = load_adapter(tmp_path / "out.safetensors", target)
    worst = dict.fromkeys(moved, 0.0)
    for name in names:
        U, _, Vh = torch.linalg.svd(target.weight(name).double(), full_matrices=False)
        U, Vh = U[:, :320], Vh[:320]
        for (file, dtype), adapter in moved.items():
            expected = U @ (U.T @ product(given[file].layers[name]) @ Vh.T) @ Vh
            error = torch.linalg.norm(product(adapter.layers[name]) - expected) / torch.linalg.norm(expected)
            worst[file, dtype] = max(worst[file, dtype], float(error))
    for (file, dtype), error in worst.items():
        # Half precision keeps 11 bits of each factor's entries, which alone makes a relative error of about 3e-4.
        half = dtype == "keep" and next(iter(given[file].layers.values())).dtype == torch.float16
        assert error < (6e-4 if half else 1e-4), worst


def product(own):
    return own.scale * own.lora_up.double() @ own.lora_down.double()


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_the_result_loads_in_diffusers(full_size, published, tmp_path, naming):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    for path in published:
        result, _ = transfer_adapter(load_adapter(path, full_size[0]), *full_size)
        save_adapter(result, tmp_path / "out.safetensors", naming=naming, dtype=torch.float32)
        file = str(tmp_path / "out.safetensors")
        state, alphas, *_ = diffusers.StableDiffusionPipeline.lora_state_dict(file, unet_config=model.config)
        model.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name=path.stem.replace(".", "_"))
        layers = {name: own for name, own in result.layers.items() if own.layer.component == "unet"}
        wrapped = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
        assert {f"unet.{name}" for name in wrapped} == set(layers)
        for name, module in wrapped.items():
            delta = module.get_delta_weight(path.stem.replace(".", "_"))
            same(delta, layers[f"unet.{name}"].delta_weight())
