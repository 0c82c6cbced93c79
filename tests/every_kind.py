"""Two small models with fused weights (FLUX.1), and an update of every kind for their layers."""

import torch
from safetensors.torch import save_file

from demo.pruned import noisy
from demo.synthetic import falling
from lorax import open_base
from lorax.adapters import (
    Adapter,
    BoftLayer,
    DiffLayer,
    FouraLayer,
    GloraLayer,
    LohaLayer,
    LokrLayer,
    LoraLayer,
    OftLayer,
)
from lorax.models.layers import Layer
from tests.tensors import randn

W = 16
NAME = "transformer.transformer_blocks.0.attn.to_q"
QKV = Layer("transformer.double_blocks.0.img_attn.qkv", (3 * W, W), "double_blocks.0.img_attn.qkv")


def flux(double=2, single=2, width=W):
    """Names and proportions of FLUX.1, reduced."""
    shapes = {"img_in": (width, 8), "txt_in": (width, 24), "final_layer.linear": (8, width)}
    for i in range(double):
        for side in ("img", "txt"):
            shapes |= {
                f"double_blocks.{i}.{side}_mod.lin": (6 * width, width),
                f"double_blocks.{i}.{side}_attn.qkv": (3 * width, width),
                f"double_blocks.{i}.{side}_attn.proj": (width, width),
                f"double_blocks.{i}.{side}_mlp.0": (4 * width, width),
                f"double_blocks.{i}.{side}_mlp.2": (width, 4 * width),
            }
    for i in range(single):
        shapes |= {
            f"single_blocks.{i}.modulation.lin": (3 * width, width),
            f"single_blocks.{i}.linear1": (7 * width, width),
            f"single_blocks.{i}.linear2": (width, 5 * width),
        }
    return shapes


def flux_bases(folder):
    generator = torch.Generator().manual_seed(2)
    source = {f"model.diffusion_model.{path}.weight": falling(shape, generator) for path, shape in flux().items()}
    source |= {key.replace(".weight", ".bias"): torch.zeros(len(value)) for key, value in source.items()}
    target = {key: noisy(value, 0.1, generator) if value.dim() > 1 else value for key, value in source.items()}
    for name, tensors in (("source", source), ("target", target)):
        save_file(tensors, folder / f"{name}.safetensors")
    return open_base(folder / "source.safetensors"), open_base(folder / "target.safetensors")


def small(*shape, seed=0):
    return 0.1 * randn(*shape, seed=seed)


def kinds(layer):
    """An update of every kind for one layer."""
    m, n = layer.matrix_shape
    up, down = small(m, 2), small(2, n)
    wide = 1 + small(1, n).abs()
    return {
        "lora": LoraLayer(layer, up, down, 1.0),
        "dora": LoraLayer(layer, up, down, 1.0, dora_scale=1 + small(m, 1).abs()),
        "dora by input": LoraLayer(layer, up, down, 1.0, dora_scale=wide),
        "loha": LohaLayer(layer, small(m, 2), small(2, n), small(m, 2, seed=1), small(2, n, seed=1), 2.0),
        "lokr": LokrLayer.read(layer, {"lokr_w1": small(4, 4), "lokr_w2": small(m // 4, n // 4)}),
        "glora": GloraLayer(layer, small(n, 2, seed=2), small(2, n, seed=3), up, down, 2.0),
        "oft": OftLayer.read(layer, {"oft_blocks": small(4, m // 4, m // 4)}, 0.0),
        "boft": BoftLayer.read(layer, {"oft_blocks": small(2, m // 4, 4, 4)}, 0.0),
        "diff": DiffLayer(layer, small(m, n)),
        "foura": FouraLayer.read(
            layer, {"foura_up": up, "foura_down": down, "foura_gate": torch.tensor([1.0, 0.5])}, 2.0
        ),
    }


def adapter_of(*layers, naming="kohya", family=None):
    return Adapter("a.safetensors", family, naming, {own.layer.name: own for own in layers})
