"""Run by the host's Python in the host's folder: small random checkpoints whose names and shapes come from the host.

    python make_models.py MODELS_FOLDER

Writes sd15-base, sd15-tuned (a changed copy), sdxl-base and ssd-1b as small as the host still detects them, CLIP-L, and
LoRA files in the host's generic kohya naming.
"""

import os
import sys
import zlib

folder = sys.argv[1]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, os.getcwd())

import comfy.options

comfy.options.enable_args_parsing()

import comfy.ops
import comfy.sd1_clip
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import save_file

COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_checkpoint": False,
}
SD15 = COMMON | {
    "context_dim": 768,
    "num_heads": 8,
    "num_head_channels": -1,
    "use_linear_in_transformer": False,
    "channel_mult": [1, 1],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
}
XL = COMMON | {
    "context_dim": 2048,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "channel_mult": [1, 1, 1],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
}
# The host tells SDXL from SSD-1B by the depths on the way down.
SDXL = XL | {"transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 1}
SSD1B = XL | {"transformer_depth": [0, 0, 2, 2, 4, 4], "transformer_depth_middle": -1}


def shapes(config):
    config = {key: list(value) if isinstance(value, list) else value for key, value in config.items()}
    with torch.device("meta"):
        model = UNetModel(**config, dtype=torch.float16, device="meta", operations=comfy.ops.disable_weight_init)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def weight(key, shape, change=0.0):
    """The same key gives the same weight in every model, so that SSD-1B is a pruned SDXL."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if len(shape) == 1:
        return (torch.randn(shape, generator=generator) * 0.02 + key.endswith(".weight")).half()
    deviation = 0.7 / torch.Size(shape[1:]).numel() ** 0.5
    matrix = torch.randn(shape, generator=generator) * deviation
    return (matrix + change * deviation * torch.randn(shape, generator=generator)).half()


def clip_shapes():
    """CLIP-L at full size: the host knows no other."""
    state = comfy.sd1_clip.SDClipModel(device="meta", dtype=torch.float16).state_dict()
    found = {key.removeprefix("transformer."): tuple(value.shape) for key, value in state.items()}
    return {key: shape for key, shape in found.items() if key.startswith("text_model.")}


def lora(shapes, prefix, inside, rank=4):
    tensors = {}
    for key, shape in shapes.items():
        if key.endswith(".weight") and inside in key and len(shape) == 2:
            name = prefix + key.removesuffix(".weight").replace(".", "_")
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            tensors[name + ".lora_up.weight"] = 0.3 * torch.randn(shape[0], rank, generator=generator)
            tensors[name + ".lora_down.weight"] = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
            tensors[name + ".alpha"] = torch.tensor(rank / 2)
    return tensors


for kind in ("checkpoints", "loras", "text_encoders"):
    os.makedirs(os.path.join(folder, kind), exist_ok=True)
for name, config, change in (
    ("sd15-base", SD15, 0.0),
    ("sd15-tuned", SD15, 0.2),
    ("sdxl-base", SDXL, 0.0),
    ("ssd-1b", SSD1B, 0.1),
):
    # Cross-attention changes twice as much, so that a threshold can part the layers.
    changes = {key: change * (2 if ".attn2." in key else 1) for key in shapes(config)}
    tensors = {
        f"model.diffusion_model.{key}": weight(key, shape, changes[key]) for key, shape in shapes(config).items()
    }
    save_file(tensors, os.path.join(folder, "checkpoints", name + ".safetensors"))
unet, text = ("lora_unet_", ".transformer_blocks."), ("lora_te_", ".self_attn.")
for name, tensors in (
    ("sd15-style", lora(shapes(SD15), *unet)),
    ("sd15-style-text", lora(shapes(SD15), *unet) | lora(clip_shapes(), *text)),
    ("sdxl-style", lora(shapes(SDXL), *unet)),
):
    save_file(tensors, os.path.join(folder, "loras", name + ".safetensors"))
clip = {key: weight(key, shape) for key, shape in clip_shapes().items()}
save_file(clip, os.path.join(folder, "text_encoders", "clip-l.safetensors"))
