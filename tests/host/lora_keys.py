"""Run by the host's Python in the host's folder: what its own LoRA loader calls the weights of each kind of model.

    python lora_keys.py

Prints JSON: for each model, small and on no device, the shape of every weight, and the host's map from LoRA keys to
weights (with dimension, start and length for a part of one, and `changed` where the rows are moved). A model that the
host does not know is null. Last, under `text`, for sets of text encoders, the host's map of a layer of each.
"""

import json
import os
import sys

sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, os.getcwd())

import comfy.options

comfy.options.enable_args_parsing()

import comfy.lora
import comfy.supported_models
import torch
from small_models import MODELS, build

found = {}
for name, (kind, config) in MODELS.items():
    model = build(comfy.supported_models, kind, config, "meta")
    if model is None:
        found[name] = None
        continue
    shapes = {key: list(value.shape) for key, value in model.state_dict().items() if key.endswith(".weight")}
    found[name] = {"shapes": shapes, "keys": comfy.lora.model_lora_keys_unet(model, {})}
found["text"] = {}
for kinds in ("clip_l", "clip_h", "t5xxl", "clip_l clip_g", "clip_l t5xxl", "clip_l clip_g t5xxl"):
    layers = {
        kind: "encoder.block.0.layer.0.SelfAttention.q" if kind == "t5xxl" else "text_model.encoder.layers.0.mlp.fc1"
        for kind in kinds.split()
    }
    encoders = torch.nn.ModuleDict()
    for kind, path in layers.items():
        place = encoders
        for part in f"{kind}.transformer.{path}".split("."):
            place[part] = torch.nn.ModuleDict() if part != path.rpartition(".")[2] else torch.nn.Linear(1, 1)
            place = place[part]
    found["text"][kinds] = comfy.lora.model_lora_keys_clip(encoders, {})
json.dump(found, sys.stdout, default=lambda function: "changed")
