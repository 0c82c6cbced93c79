"""Run by the host's Python in the host's folder: what the pack reads of a GGUF model that ComfyUI-GGUF has loaded.

    python read_gguf.py MODELS_FOLDER PACK COMFYUI_GGUF OUT

Writes to the folder OUT, by layer: `plain` is what the pack reads of sd15-base.gguf, `fp16` of the checkpoint that it
was made of, `patched` of a MODEL with the LoRA sd15-style as the host's own patches, `loaded` of that and `left` of the
plain MODEL while those patches are in the weights. `layers` holds the original path and the shape of each layer of the
GGUF model and of the checkpoint.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

models, pack, gguf_pack, out = map(Path, sys.argv[1:])
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, os.getcwd())

import comfy.options

comfy.options.enable_args_parsing()

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from load_pack import load_pack
from safetensors.torch import save_file

import nodes


def read(model):
    base = host.open_model(model)
    return {name: base.weight(name).clone() for name in base.layers}


folder_paths.add_model_folder_path("diffusion_models", str(models / "checkpoints"))
assert asyncio.run(nodes.load_custom_node(str(gguf_pack)))
host, _ = load_pack(pack)
lora = comfy.utils.load_torch_file(str(models / "loras/sd15-style.safetensors"))
with torch.inference_mode():
    (model,) = nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet("sd15-base.gguf")
    half = comfy.sd.load_diffusion_model(str(models / "checkpoints/sd15-base.safetensors"))
    patched = comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)[0]
    found = {"plain": read(model), "fp16": read(half), "patched": read(patched)}
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    assert any(getattr(weight, "patches", None) for weight in model.model.parameters())
    found |= {"loaded": read(patched), "left": read(model)}
    bases = [host.open_model(each) for each in (model, half)]
for name, weights in found.items():
    save_file(weights, out / f"{name}.safetensors")
layers = [{layer.name: [layer.original, layer.shape] for layer in base.layers.values()} for base in bases]
(out / "layers.json").write_text(json.dumps(layers))
