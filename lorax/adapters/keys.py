"""The keys of adapter files: which layer they mean, and which part of its update."""

from typing import NamedTuple

from ..families import Family
from ..layers import Layer, flatten

ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
    ".delta": "delta",
}
# prefix -> (component, naming)
PREFIXES = {
    "lora_unet_": ("unet", "kohya"),
    "lora_te1_": ("text_encoder", "kohya"),
    "lora_te2_": ("text_encoder_2", "kohya"),
    "lora_te_": ("text_encoder", "kohya"),
    "base_model.model.text_model.": ("text_encoder", "peft"),
    "base_model.model.": ("unet", "peft"),
    "unet.": ("unet", "diffusers"),
    "text_encoder.": ("text_encoder", "diffusers"),
    "text_encoder_2.": ("text_encoder_2", "diffusers"),
    "diffusion_model.": ("unet", "diffusers"),
    "text_model.": ("text_encoder", "diffusers"),
    "": ("unet", "diffusers"),
}


class Key(NamedTuple):
    """What a key says: the component, the module path as it is spelled, the role of the tensor, the file's naming."""

    component: str
    path: str
    role: str
    naming: str


def parse(key: str) -> Key | None:
    """Return what a key of an adapter file means; None if it belongs to no update that is known."""
    if key.startswith(("unet:", "text_encoder:")):
        component, number, role = [*key.split(":"), "", ""][:3]
        return Key(component, number, role, "indexed") if number.isdigit() and role in ("up", "down") else None
    suffix = next((suffix for suffix in ROLES if key.endswith(suffix)), None)
    if suffix is None:
        return None
    module = key.removesuffix(suffix).replace(".processor", "")
    prefix = next(prefix for prefix in PREFIXES if module.startswith(prefix))
    component, naming = PREFIXES[prefix]
    path = module if prefix == "text_model." else module.removeprefix(prefix)
    if prefix.endswith("text_model."):
        path = "text_model." + path.removeprefix("text_model.")
    return Key(component, path, ROLES[suffix], naming)


def indexed_layers(family: Family, component: str) -> list[Layer]:
    """Return the layers in the order by which the indexed format (`unet:<i>:up`) counts them.

    That is the order in which diffusers 0.10 registers the linear layers of its attention modules and of the GEGLU, as
    cloneofsimo/lora walks them: the middle block last, the feed-forward between the two attentions; in the text
    encoder k, v, q, out.

    Args:
        family: The family of the base.
        component: `unet` or `text_encoder`.
    """
    if family.unet is None:
        return []
    layers = [layer for layer in family.table.values() if layer.component == component and layer.is_attention]
    if component != "unet":
        return layers
    blocks = list(dict.fromkeys(layer.path.partition(".attn")[0] for layer in layers))
    blocks.sort(key=lambda block: ("down", "up", "mid").index(block.partition("_")[0]))
    parts = [f"attn1.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    parts += ["ff.net.0.proj"] + [part.replace("attn1", "attn2") for part in parts]
    return [family.table[f"unet.{block}.{part}"] for block in blocks for part in parts]


def kohya_module(layer: Layer, family: Family | None) -> str:
    """Return the module name of a layer in kohya's LoRA files: `lora_unet_...`, `lora_te_...`, `lora_te1_...`."""
    if layer.is_main:
        use_original = family is not None and family.kohya == "original" and layer.original
        return "lora_unet_" + flatten(layer.original if use_original else layer.path)
    encoders = family.text_encoders if family is not None else ()
    prefix = next((encoder.kohya for encoder in encoders if encoder.component == layer.component), "lora_te")
    return f"{prefix}_{flatten(layer.path)}"
