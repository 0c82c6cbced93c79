"""Run by the host's Python in the host's folder: LoRAs of input layers, applied by the pack to models of more channels.

    python apply_wide.py PACK OUT

Writes OUT/<name>.safetensors for each of WIDE: `up` and `down` of the LoRA, which is made for the model of fewer
channels, the `weight` of the other's input layer, and what the host makes of it with the patches, `patched`.
"""

import os
import sys
from pathlib import Path

pack, out = map(Path, sys.argv[1:])
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, os.getcwd())

import comfy.options

comfy.options.enable_args_parsing()

import comfy.lora
import comfy.model_patcher
import comfy.supported_models
import torch
from load_pack import load_pack
from safetensors.torch import save_file
from small_models import MODELS, build

INNER, RANK = "diffusion_model.", 3
# Name -> the model in small_models.py, the input layer, what of its configuration tells the one that reads more.
WIDE = {
    "fill": ("flux", "img_in", {"in_channels": 96}),
    "image to video": ("wan", "patch_embedding", {"in_dim": 36, "model_type": "i2v"}),
    "hunyuan, image to video": ("hunyuan_video", "img_in.proj", {"in_channels": 33}),
}


def made(kind, config):
    """Return a model with random weights, as a MODEL."""
    model = build(comfy.supported_models, kind, config, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


host, lorax = load_pack(pack)
torch.manual_seed(0)
with torch.inference_mode():
    for name, (model, module, more) in WIDE.items():
        kind, config = MODELS[model]
        narrow, wide, key = made(kind, config), made(kind, config | more), f"{INNER}{module}.weight"
        before = narrow.model.get_parameter(key)
        (spelled, *_) = [k for k, v in comfy.lora.model_lora_keys_unet(narrow.model, {}).items() if v == key]
        up, down = torch.randn(before.shape[0], RANK), torch.randn(RANK, *before.shape[1:])
        path = out / "lora.safetensors"
        save_file({f"{spelled}.lora_up.weight": up, f"{spelled}.lora_down.weight": down}, path)
        base = host.open_model(wide)
        patched, _, missing = host.apply_adapter(wide, None, lorax.load_adapter(path, base), 0.5)
        assert not missing
        weight = wide.model.get_parameter(key).clone()
        found = comfy.lora.calculate_weight(patched.patches[key], weight.clone(), key)
        save_file({"up": up, "down": down, "weight": weight, "patched": found}, out / f"{name}.safetensors")
(out / "lora.safetensors").unlink()
