"""Run by the host's Python in the host's folder: the host's own loader and arithmetic on adapter files, model by model.

    python apply_bases.py FOLDER PACK

FOLDER is what make_bases.py wrote, with adapter files beside the checkpoints: `<case>.adapter.safetensors`, which the
host's LoRA loader reads, and `<case>.pack.safetensors`, of kinds that it does not know, which the pack in the folder
PACK reads and applies. Writes FOLDER/<name>/applied.safetensors: for each case and parameter that it changes the new
values, `<case>:<parameter>`. Prints JSON: model -> case -> the keys that were not loaded, the patches that found no
weight, and what the host logged.
"""

import json
import logging
import os
import sys
from pathlib import Path

folder, pack = Path(sys.argv[1]), Path(sys.argv[2])
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, os.getcwd())

import comfy.options

comfy.options.enable_args_parsing()

import comfy.lora
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from load_pack import load_pack
from safetensors.torch import save_file
from small_models import SMALLEST, build

INNER = "diffusion_model."
LEFT = "lora key not loaded: "
logged = []


class Record(logging.Handler):
    """Keeps what the host says while it loads and applies."""

    def emit(self, record):
        logged.append(record.getMessage())


def open_model(name):
    """Build a model and load the target checkpoint into it; None if the host does not know it."""
    kind, config = SMALLEST[name]
    model = build(comfy.supported_models, kind, config, "cpu")
    model.load_model_weights(comfy.utils.load_torch_file(str(folder / name / "target.safetensors")), f"model.{INNER}")
    assert not logged, logged
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def apply_stock(model, path):
    """Apply a file as the host's LoRA node does; return the patched model and the patches that found no weight."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(comfy.utils.load_torch_file(str(path), safe_load=True), keys)
    patched = model.clone()
    return patched, sorted(map(str, set(patches) - set(patched.add_patches(patches, 1.0))))


def apply_pack(model, path, host, lorax):
    """Apply a file of a kind that only the pack knows, a LoRA-X as the LoRA that it is on this model."""
    base = host.open_model(model)
    adapter = lorax.load_adapter(path, base)
    if adapter.kind == "lora-x":
        adapter = lorax.convert_to_lora(adapter, base)
    patched, _, missing = host.apply_adapter(model, None, adapter, 1.0)
    return patched, missing


def changed(patched):
    """Return the new values of every parameter that has patches."""
    for key, patches in patched.patches.items():
        weight = comfy.model_patcher.get_key_weight(patched.model, key)[0]
        weight = weight.detach().to(torch.float32, copy=True)
        yield key, comfy.lora.calculate_weight(patches, weight, key).contiguous()


logging.getLogger().addHandler(Record(logging.WARNING))
found = {}
host, lorax = load_pack(pack)
with torch.inference_mode():
    for name in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        logged.clear()
        model, applied, found[name] = open_model(name), {}, {}
        for path in sorted((folder / name).glob("*.*.safetensors")):
            logged.clear()
            case = path.name.removesuffix(".safetensors")
            stock = case.endswith(".adapter")
            patched, refused = apply_stock(model, path) if stock else apply_pack(model, path, host, lorax)
            for key, weight in changed(patched):
                applied[f"{case}:{key.removeprefix(INNER)}"] = weight.clone()
            left = [text.removeprefix(LEFT) for text in logged if text.startswith(LEFT)]
            rest = [text for text in logged if not text.startswith(LEFT)]
            found[name][case] = {"left": left, "refused": refused, "logged": rest}
        save_file(applied, folder / name / "applied.safetensors")
json.dump(found, sys.stdout)
