"""Models that ComfyUI-GGUF loads, by the real pack in a real ComfyUI."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_server import node, sampling, save, transfer
from test_train import losses, training

gguf = pytest.importorskip("gguf")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def served(host, real_host, gguf_pack):
    """The host with the models sd15-base and sd15-tuned as GGUF files too."""
    for name in ("sd15-base", "sd15-tuned"):
        path = host.base / "models/checkpoints" / name
        words = [f"{path}.safetensors", f"{path}.gguf", "sd1"]
        subprocess.run([real_host[1], HERE.parent / "write_gguf.py", *words], check=True)
    return host


@pytest.fixture(scope="module")
def read(served, real_host, gguf_pack, tmp_path_factory):
    """What read_gguf.py wrote, and the file that it read."""
    out, models = tmp_path_factory.mktemp("read"), served.base / "models"
    path, python = real_host
    subprocess.run([python, HERE / "read_gguf.py", models, ROOT, gguf_pack, out], cwd=path, check=True)
    found = {path.stem: load_file(path) for path in out.glob("*.safetensors")}
    reader = gguf.GGUFReader(models / "checkpoints/sd15-base.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    return found | {"layers": json.loads((out / "layers.json").read_text()), "stored": stored}


def phi(weight, other):
    """The similarity of the inputs of two layers, by its formula."""
    grams = [each.double().T @ each.double() for each in (weight, other)]
    return float((grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()))


def test_the_layers_are_those_of_the_checkpoint_and_their_weights_what_the_file_holds(read):
    """Oracle: the numbers that the gguf package makes of the file; so its file and its MODEL have the same digests."""
    ours, theirs = read["layers"]
    assert ours == theirs
    kinds = set()
    for name, (original, shape) in ours.items():
        stored = read["stored"][f"{original}.weight"]
        kinds.add(stored.tensor_type.name)
        expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type)).reshape(shape).flatten(1)
        assert torch.equal(read["plain"][name], expected.float())
    assert kinds == {"Q8_0", "F16"}


def test_eight_bits_are_as_similar_as_they_are_close_to_sixteen(read):
    for name, weight in read["fp16"].items():
        quantised = read["plain"][name]
        assert float((quantised - weight).norm() / weight.norm()) < 6e-3
        assert abs(phi(quantised, weight) - 1) < 2e-3


def test_patches_of_the_host_are_in_the_weights_of_their_model_only_and_once(read):
    moved = 0
    for name, plain in read["plain"].items():
        assert torch.equal(read["left"][name], plain)
        torch.testing.assert_close(read["loaded"][name], read["patched"][name], rtol=1e-5, atol=1e-6)
        moved += not torch.equal(read["patched"][name], plain)
    assert moved == 70


def test_a_transfer_to_a_quantised_model_from_one(served):
    """The patches are found where the loader puts them on while it computes: the stock node gives the same latent."""
    prompt = transfer(method="project", rank=100)
    for number, name in (("1", "sd15-base"), ("2", "sd15-tuned")):
        prompt[number] = node("UnetLoaderGGUF", unet_name=f"{name}.gguf")
    ours = served.run(prompt | {"6": save(adapter=["4", 0]), "7": node("PreviewAny", source=["4", 1])})
    assert ours.ok, ours.error
    assert "70 of 70 layers arrived" in ours.outputs["7"]["text"][0]
    plain = {"2": prompt["2"], **sampling("2")}
    assert not torch.allclose(served.run(plain).latent(), ours.latent(), atol=1e-3)
    name = ours.outputs["6"]["text"][0]
    loader = node("LoraLoaderModelOnly", model=["2", 0], lora_name=name, strength_model=1.0)
    stock = {"2": prompt["2"], "5": loader, **sampling("5")}
    torch.testing.assert_close(ours.latent(), served.run(stock).latent(), rtol=1e-3, atol=1e-3)
    prompt["5"]["inputs"]["strength"] = 0.0
    assert torch.equal(served.run(prompt).latent(), served.run(plain).latent())


def test_what_is_converted_by_the_file_is_of_the_model(served):
    """A LoRA-X is refused by a model whose weights differ from those of its source."""
    prompt = {
        "1": node("LoraXBase", base_name="diffusion_models/sd15-base.gguf"),
        "2": node("UnetLoaderGGUF", unet_name="sd15-base.gguf"),
        "3": node("LoraXLoader", lora_name="sd15-style.safetensors"),
        "4": node("LoraXConvert", adapter=["3", 0], source=["1", 0], rank=16),
        "5": node("LoraXApply", model=["2", 0], adapter=["4", 0], strength=1.0),
        **sampling("5"),
    }
    result = served.run(prompt)
    assert result.ok, result.error
    wrong = prompt | {"2": node("UnetLoaderGGUF", unet_name="sd15-tuned.gguf")}
    assert "own source base" in served.run(wrong).error


def test_training_on_a_quantised_model(served):
    whole = training(steps=3, rank=8)
    results = [served.run(whole | loader) for loader in ({}, {"1": node("UnetLoaderGGUF", unet_name="sd15-base.gguf")})]
    assert all(result.ok for result in results), [result.messages for result in results]
    assert losses(results[1]) != losses(results[0])
    assert losses(results[1]) == pytest.approx(losses(results[0]), rel=0.02)
