"""Run by the host's Python in the host's folder: two small checkpoints of each kind of model, by the host's classes.

    python make_bases.py FOLDER

Writes FOLDER/<name>/source.safetensors with random weights and target.safetensors, the same with 10 % of noise, both
with the names that checkpoints have. Prints JSON: the host's version, and for each model how a LoRA file in kohya's
naming calls each module; null where the host does not know the model.
"""

import json
import os
import sys
import zlib
from pathlib import Path

folder = Path(sys.argv[1])
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, os.getcwd())

import comfy.options

comfy.options.enable_args_parsing()

import comfy.lora
import comfy.supported_models
import torch
from comfyui_version import __version__
from safetensors.torch import save_file
from small_models import SMALLEST, build

INNER = "diffusion_model."
# Kohya's files have the names of diffusers for these; for others the host's first name is theirs.
NAMED_LAST = ("sd1", "sd2")


def random(name, key, shape):
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {key}".encode()))
    numbers = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        numbers /= torch.Size(shape[1:]).numel() ** 0.5
    else:
        numbers = 0.1 * numbers + (not key.endswith("bias"))
    return numbers, torch.randn(shape, generator=generator) * 0.1 * numbers.square().mean().sqrt()


def module_names(name, keys):
    """Return for each module the name of kohya's files; of several the one that is usual for the model."""
    found = {}
    for key, target in keys.items():
        if key.startswith("lora_unet_") and isinstance(target, str) and target.endswith(".weight"):
            module = target.removeprefix(INNER).removesuffix(".weight")
            if module not in found or name in NAMED_LAST:
                found[module] = key
    return found


def write(name, model):
    """Write both checkpoints of a model."""
    path = folder / name
    path.mkdir(parents=True)
    source, target = {}, {}
    for key, value in model.diffusion_model.state_dict().items():
        if value.is_floating_point():
            weight, noise = random(name, key, tuple(value.shape))
            source[f"model.{INNER}{key}"], target[f"model.{INNER}{key}"] = weight, weight + noise
    save_file(source, path / "source.safetensors")
    save_file(target, path / "target.safetensors")


models = {}
for name, (kind, config) in SMALLEST.items():
    model = build(comfy.supported_models, kind, config, "meta")
    if model is not None:
        write(name, model)
    models[name] = None if model is None else module_names(name, comfy.lora.model_lora_keys_unet(model, {}))
json.dump({"version": __version__, "models": models}, sys.stdout)
