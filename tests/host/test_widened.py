"""Adapters with an input layer on models that read more channels, in a real ComfyUI server."""

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_server import node, sampling

KEY, CONV = "model.diffusion_model.input_blocks.0.0.weight", "lora_unet_conv_in"
QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def checkpoints(host):
    """The model sd15-base, and one made of it for inpainting: a mask and the masked picture are read too."""
    folder = host.base / "models/checkpoints"
    tensors = load_file(folder / "sd15-base.safetensors")
    wide = torch.cat([tensors[KEY], 0.1 * randn(320, 5, 3, 3, seed=1).half()], 1)
    save_file(tensors | {KEY: wide}, folder / "sd15-inpaint.safetensors")
    return {name: load_file(folder / f"{name}.safetensors")[KEY].float() for name in ("sd15-base", "sd15-inpaint")}


def lora(channels):
    """A LoRA of the input layer of a model with these channels and of another layer, and the update of the first."""
    up, down = 0.1 * randn(320, 4, 1, 1, seed=2), 0.1 * randn(4, channels, 3, 3, seed=3)
    tensors = {f"{CONV}.lora_up.weight": up, f"{CONV}.lora_down.weight": down, f"{CONV}.alpha": torch.tensor(2.0)}
    tensors |= {f"{QUERY}.lora_up.weight": 2 * up.flatten(1), f"{QUERY}.lora_down.weight": randn(4, 320, seed=4)}
    return tensors, 2 / 4 * torch.einsum("or,rchw->ochw", up.flatten(1), down)


def dora(channels, weight):
    """The same with the magnitude of each row; the update of a weight that is `W + dW` with other lengths of rows."""
    tensors, update = lora(channels)
    magnitude = randn(320, seed=5).abs()
    merged = weight[:, :channels] + update
    lengths = merged.flatten(1).norm(dim=1)
    return tensors | {f"{CONV}.dora_scale": magnitude.reshape(-1, 1, 1, 1)}, (
        merged * (magnitude / lengths)[:, None, None, None] - weight[:, :channels]
    )


@pytest.mark.parametrize(
    ("name", "channels", "kind"),
    [("sd15-inpaint", 4, "lora"), ("sd15-inpaint", 4, "dora"), ("sd15-base", 9, "lora")],
)
def test_the_channels_that_both_read_take_the_update(host, checkpoints, name, channels, kind):
    weight = checkpoints[name]
    tensors, update = lora(channels) if kind == "lora" else dora(channels, weight)
    save_file(tensors, host.base / f"models/loras/{kind}-{channels}.safetensors")
    prompt = {
        "1": node("CheckpointLoaderSimple", ckpt_name=f"{name}.safetensors"),
        "2": node("LoraXLoader", lora_name=f"{kind}-{channels}.safetensors"),
        "5": node("LoraXApply", model=["1", 0], adapter=["2", 0], strength=0.5),
        "6": node("ModelSave", model=["5", 0], filename_prefix=f"{name}-{kind}-{channels}"),
        **sampling("5"),
    }
    result = host.run(prompt)
    assert result.ok, result.error
    (saved,) = (host.base / "output").glob(f"{name}-{kind}-{channels}_*.safetensors")
    expected, shared = weight.clone(), min(4, channels)
    expected[:, :shared] += 0.5 * update[:, :shared]
    found = load_file(saved)[KEY].float()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)
    assert torch.equal(found[:, 4:], weight[:, 4:])


def test_so_do_fill_and_image_to_video(real_host, tmp_path):
    """FLUX.1 Fill, and Wan and HunyuanVideo that read a first frame; small, of the host's own classes."""
    path, python = real_host
    subprocess.run([python, Path(__file__).with_name("apply_wide.py"), ROOT, tmp_path], cwd=path, check=True)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.stem for file in files] == ["fill", "hunyuan, image to video", "image to video"]
    for file in files:
        tensors = load_file(file)
        weight, update = tensors["weight"].clone(), 0.5 * torch.tensordot(tensors["up"], tensors["down"], 1)
        assert update.shape[1] < weight.shape[1]
        weight[:, : update.shape[1]] += update
        torch.testing.assert_close(tensors["patched"], weight, rtol=1e-5, atol=1e-5)
