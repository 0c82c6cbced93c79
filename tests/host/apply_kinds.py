"""Run by the host's Python in the host's folder: the host's own loader and arithmetic on adapter files.

    python apply_kinds.py FOLDER

FOLDER holds `base.safetensors` (the weight of each module, by its name) and adapter files. Writes
`applied.safetensors`: for each adapter file and parameter that it changed, `<file>:<parameter>`, the new weight; and
prints what was not loaded.
"""

import os
import sys
from pathlib import Path

folder = Path(sys.argv[1])
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, os.getcwd())

import comfy.options

comfy.options.enable_args_parsing()

import comfy.lora
import torch
from safetensors.torch import load_file, save_file

base = load_file(folder / "base.safetensors")
names = {key.removesuffix(".weight"): f"diffusion_model.{key}" for key in base if key.endswith(".weight")}
keys = {f"lora_unet_{name}": target for name, target in names.items()}
keys |= {f"diffusion_model.{name}": target for name, target in names.items()}
applied = {}
for path in sorted(folder.glob("*.adapter.safetensors")):
    patches = comfy.lora.load_lora(load_file(path), keys)
    for key, patch in patches.items():
        weight = base[key.removeprefix("diffusion_model.")].clone()
        with torch.inference_mode():
            new = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight, key)
        applied[f"{path.name.partition('.')[0]}:{key.removeprefix('diffusion_model.')}"] = new.clone().contiguous()
save_file(applied, folder / "applied.safetensors")
