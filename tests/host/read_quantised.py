"""Run by the host's Python in the host's folder: what the pack reads of models in the host's own quantised formats.

    python read_quantised.py MODELS_FOLDER PACK OUT

Writes OUT/<format>.safetensors, sd15-base with attention layers in that format. Prints JSON: format -> layer -> how far
what the pack reads is from what the host makes of that weight, and from the checkpoint, as shares of its norm; an empty
object where this version of the host has no such formats.
"""

import json
import os
import sys
from pathlib import Path

models, pack, out = map(Path, sys.argv[1:])
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, os.getcwd())

import comfy.options

comfy.options.enable_args_parsing()

try:
    import comfy.quant_ops
except ImportError:
    sys.stdout.write("{}")
    sys.exit()
import comfy.sd
import torch
from load_pack import load_pack
from safetensors.torch import load_file, save_file

INNER = "model.diffusion_model."
# Those that take layers of any width.
FORMATS = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise")


def quantised(weights, kind):
    """Return the tensors of a file in which attention layers are in a format."""
    layout, tensors = comfy.quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"], {}
    for key, weight in weights.items():
        if weight.dim() == 2 and ".attn1." in key:
            made = comfy.quant_ops.QuantizedTensor.from_float(weight.to(torch.bfloat16), layout)
            tensors |= {name: part.contiguous() for name, part in made.state_dict(key).items()}
            text = json.dumps({"format": kind}).encode()
            tensors[f"{key.removesuffix('weight')}comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        else:
            tensors[key] = weight
    return tensors


host, _ = load_pack(pack)
found = {}
checkpoint = load_file(models / "checkpoints/sd15-base.safetensors")
checkpoint = {key.removeprefix(INNER): weight for key, weight in checkpoint.items()}
with torch.inference_mode():
    for kind in FORMATS:
        if kind not in comfy.quant_ops.QUANT_ALGOS:
            continue
        save_file(quantised(checkpoint, kind), out / f"{kind}.safetensors")
        model = comfy.sd.load_diffusion_model(str(out / f"{kind}.safetensors"))
        base, found[kind] = host.open_model(model), {}
        for layer in base.layers.values():
            if ".attn1." in layer.original:
                read, true = base.weight(layer.name), checkpoint[f"{layer.original}.weight"].float()
                held = model.model.get_parameter(f"diffusion_model.{layer.original}.weight")
                assert type(held).__name__ == "QuantizedTensor"
                theirs = held.dequantize().float()
                found[kind][layer.name] = [float((read - each).norm() / true.norm()) for each in (theirs, true)]
json.dump(found, sys.stdout)
