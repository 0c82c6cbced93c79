"""The keys of adapter files: what one says (component, module, part), and how a layer is spelled in a naming."""

import re
from typing import NamedTuple

from ..models.family import Family
from ..models.layers import Layer, flatten, unwrapped
from .kinds import KINDS

# The ends of keys -> the field of the update that the tensor is. Longer ends come before those that they end with.
ROLES = {
    ".lora_down.weight": "lora_down",
    ".lora_up.weight": "lora_up",
    ".lora_mid.weight": "lora_mid",
    ".lora_A.weight": "lora_down",
    ".lora_B.weight": "lora_up",
    ".lora_A": "lora_down",
    ".lora_B": "lora_up",
    ".lora_linear_layer.down.weight": "lora_down",
    ".lora_linear_layer.up.weight": "lora_up",
    ".lora.down.weight": "lora_down",
    ".lora.up.weight": "lora_up",
    "_lora.down.weight": "lora_down",
    "_lora.up.weight": "lora_up",
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "dora_scale",
    ".lora_magnitude_vector.weight": "dora_scale",
    ".reshape_weight": "reshape_weight",
    ".alpha": "alpha",
}
ROLES |= {
    f".{kind.KEYS.get(name, name)}": name for kind in KINDS for name in sorted(kind.REQUIRED | kind.OPTIONAL)
}  # fmt: skip
# Differences of one-dimensional parameters -> which parameter of the module they are of.
VECTOR_ROLES = {"diff_b": "bias", "lora_bias": "bias", "b_norm": "bias", "w_norm": "weight"}
ROLES |= {f".{role}": role for role in ("diff_b", "w_norm", "b_norm")}
# Kinds of text encoder, as ComfyUI calls them; a family says which component each is.
ENCODER_KINDS = ("clip_l", "clip_g", "clip_h", "t5xxl")
# prefix -> (component or kind of text encoder, naming)
PREFIXES = {
    "lora_unet__": ("unet", "kohya"),
    "lora_unet_": ("unet", "kohya"),
    "oft_unet_": ("unet", "kohya"),
    "Hunyuan_video_I2V_lora_": ("unet", "kohya"),
    "lora_transformer_": ("unet", "onetrainer"),
    "lycoris_": ("unet", "simpletuner"),
    "lora_te1_": ("text_encoder", "kohya"),
    "lora_te2_": ("text_encoder_2", "kohya"),
    "lora_te3_": ("t5xxl", "kohya"),
    "lora_te_": ("text_encoder", "kohya"),
    "base_model.model.text_model.": ("text_encoder", "peft"),
    "unet.base_model.model.": ("unet", "peft"),
    "transformer.base_model.model.": ("unet", "peft"),
    "base_model.model.": ("unet", "peft"),
    "model.diffusion_model.": ("unet", "original"),
    "diffusion_model.": ("unet", "original"),
    **{f"text_encoders.{kind}.transformer.": (kind, "original") for kind in ENCODER_KINDS},
    "unet.": ("unet", "diffusers"),
    "transformer.": ("unet", "diffusers"),
    "text_encoder.": ("text_encoder", "diffusers"),
    "text_encoder_2.": ("text_encoder_2", "diffusers"),
    "text_encoder_3.": ("text_encoder_3", "diffusers"),
    "text_model.": ("text_encoder", "diffusers"),
    "": ("unet", "diffusers"),
}
# How the XLabs trainer and USO call the attention of FLUX's double blocks, and in single blocks the attention rows of
# linear1, and linear2.
XLABS = {
    "qkv_lora1": "img_attn.qkv", "qkv_lora2": "txt_attn.qkv", "qkv_lora": "linear1_qkv",
    "proj_lora1": "img_attn.proj", "proj_lora2": "txt_attn.proj", "proj_lora": "linear2",
}  # fmt: skip
XLABS_KEY = re.compile(rf"(.*\.)processor\.({'|'.join(XLABS)})\.(down|up)\.weight")
# The name of an adapter in a model of PEFT, `default` or any other, which its files do without.
ADAPTER_NAME = re.compile(
    r"(?<=\.)(lora_[AB]|lora_magnitude_vector|lora_embedding_[AB]|(?:hada|lokr)_\w+)"
    r"\.(?!(?:weight|bias|scalar)$)[^.]+(?=$|\.(?:weight|bias)$)"
)
# The blocks of CLIP as transformers 5 calls them; before, they were in `text_model`.
CLIP_BLOCK = re.compile(r"encoder([._])layers\1\d+\1(self_attn|mlp|layer_norm)")
# Where diffusers has a part of a model as a component of its own -> the module of the whole.
COMPONENTS = {"text_conditioner.": "llm_adapter."}
INPUT_SIDE = "a rotation of PEFT, of the inputs and by settings that the file does not hold: merge it with PEFT first"
EMBEDDING = "a textual-inversion vector: a LoRA file has no place for it, keep the original beside the result"
PARTS_OF_OFT = "OFT of kohya's scripts for FLUX, with blocks for each part of a fused weight: merge it with them first"
# Differences that ComfyUI adds to parameters which are no weight or bias of a layer (Wan, LTX).
PARAMETER = r"(?:(?<=[._]modulation)|(?<=scale_shift_table)|(?<=emb_pos))\.diff$"
NO_LAYER = "the difference of a parameter that is neither weight nor bias of a layer: it stays with its own base"
REASONS = (
    (PARAMETER, NO_LAYER),
    (r"\.oft_blocks\.\d+$", PARTS_OF_OFT),
    (r"\.set_weight$|\.(query|key)_norm\.scale$", "it replaces a weight: that is no update of one"),
    (r"\.b?oft_[RS](\.|$)|\.boft_s(\.|$)", INPUT_SIDE),
    (
        r"\.lora_embedding_[AB](\.|$)|\.token_emb",
        "an update of an embedding: only linear and convolution layers are read",
    ),
    (r"\.bm\.weight$|\.lokr_t1$", "a form of GLoRA or LoKr that no program writes and none reads"),
    (r"\.on_input$|\.ia3_", "(IA)^3, a kind that is not read"),
    (r"\.vera_lambda|\.lora_E(\.|$)|\.hada_w.*\.scalar$", "a part of a kind that is not read"),
    (r"^bundle_emb\.", EMBEDDING),
)
UNKNOWN_KEY = "not a part of any update that is known"
# Namings that flatten diffusers paths -> the prefix of the main model.
FLATTENED = {"onetrainer": "lora_transformer_", "simpletuner": "lycoris_"}


class Key(NamedTuple):
    """What a key says: the component, the module path as it is spelled, the role of the tensor, the file's naming."""

    component: str
    path: str
    role: str
    naming: str


def parse(key: str) -> Key | None:
    """Return what a key of an adapter file means; None if it belongs to no update that is known.

    The component is that of SD and SDXL, or a kind of text encoder (`t5xxl`); `unet` is the main model of any family.
    """
    if key.startswith(("unet:", "text_encoder:")):
        component, number, role = [*key.split(":"), "", ""][:3]
        known = number.isdecimal() and role in ("up", "down")
        return Key(component, number, f"lora_{role}", "indexed") if known else None
    if found := XLABS_KEY.fullmatch(key):
        key = f"{found[1]}{XLABS[found[2]]}.lora_{found[3]}.weight"
    key = ADAPTER_NAME.sub(r"\1", unwrapped(key))
    suffix = next((suffix for suffix in ROLES if key.endswith(suffix)), None)
    if suffix is None or re.search(PARAMETER, key):
        return None
    module = key.removesuffix(suffix).replace(".processor", "")
    prefix = next(prefix for prefix in PREFIXES if module.startswith(prefix))
    component, naming = PREFIXES[prefix]
    path = unwrapped(module.removeprefix(prefix))
    for start, whole in COMPONENTS.items():
        path = whole + path.removeprefix(start) if path.startswith(start) else path
    if prefix.endswith("text_model."):
        path = f"text_model.{path}"
    elif found := CLIP_BLOCK.match(path):
        component = "text_encoder" if component == "unet" else component
        path = f"text_model{found[1]}{path}"
    return Key(component, path, ROLES[suffix], naming)


def why_unknown(key: str) -> str:
    """Return why a key that `parse` does not know is not used."""
    return next((why for pattern, why in REASONS if re.search(pattern, key)), UNKNOWN_KEY)


def unread_module(key: str) -> str:
    """Return the module of an update of a kind that is not read; empty where the tensor is no update of a layer."""
    found = next((found for pattern, _ in REASONS if (found := re.search(pattern, key))), None)
    return key[: found.start()] if found else ""


def indexed_layers(family: Family, component: str) -> list[Layer]:
    """Return the layers in the order by which the indexed format (`unet:<i>:up`) counts them.

    That is the order in which diffusers 0.10 registers the linear layers of its attention modules and of the GEGLU, as
    cloneofsimo/lora walks them: the middle block last, the feed-forward between the two attentions; in the text
    encoder k, v, q, out.

    Args:
        family: The family of the base.
        component: `unet` or `text_encoder`.
    """
    if family.component != "unet":
        return []
    layers = [layer for layer in family.table.values() if layer.component == component and layer.is_attention]
    if component != "unet":
        return layers
    blocks = list(dict.fromkeys(layer.path.partition(".attn")[0] for layer in layers))
    blocks.sort(key=lambda block: ("down", "up", "mid").index(block.partition("_")[0]))
    parts = [f"attn1.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    parts += ["ff.net.0.proj"] + [part.replace("attn1", "attn2") for part in parts]
    return [family.table[f"unet.{block}.{part}"] for block in blocks for part in parts]


def module_name(layer: Layer, family: Family | None, naming: str) -> str:
    """Return how a file calls a layer, or the module of a parameter.

    Args:
        layer: The layer.
        family: The family of its base, None where it is unknown.
        naming: `kohya` (`lora_unet_...`, `lora_te_...`), `onetrainer` (`lora_transformer_...`), `simpletuner`
            (`lycoris_...`), `original` (`diffusion_model....`) or `diffusers`.
    """
    encoder = next((e for e in family.text_encoders if e.component == layer.component), None) if family else None
    if naming == "diffusers" and not _is_whole(layer, family):
        part = next((part for part, whole in COMPONENTS.items() if layer.path.startswith(whole)), None)
        return layer.name if part is None else part + layer.path.removeprefix(COMPONENTS[part])
    if naming in FLATTENED and layer.is_main and not _is_whole(layer, family):
        return FLATTENED[naming] + flatten(layer.path)
    if naming in ("diffusers", "original"):
        prefix = "diffusion_model" if layer.is_main else f"text_encoders.{encoder.kind}.transformer" if encoder else ""
        return f"{prefix}.{layer.original or layer.path}" if prefix else layer.name
    if layer.is_main:
        return "lora_unet_" + flatten(layer.original if _uses_original(layer, family) else layer.path)
    return f"{encoder.kohya if encoder else 'lora_te'}_{flatten(layer.path)}"


def is_fused(layer: Layer, family: Family | None, naming: str) -> bool:
    """Return whether a file in this naming knows the layer only as a part of a fused weight."""
    if naming != "original" and not (naming == "kohya" and _uses_original(layer, family)):
        return False
    return layer.rows is not None or (layer.path != layer.original and len(parts_of(layer, family)) > 1)


def parts_of(layer: Layer, family: Family | None) -> list[str]:
    """Return the names of all layers that lie in the original weight of a layer, in row order, as the family knows."""
    if family is None or not layer.original:
        return []
    return [part.name for part in family.find(layer.component, layer.original)]


def _is_whole(layer: Layer, family: Family | None) -> bool:
    """Return whether this is a fused weight as one layer, for which diffusers has no name."""
    return layer.path == layer.original and len(parts_of(layer, family)) > 1


def _uses_original(layer: Layer, family: Family | None) -> bool:
    return bool(layer.original) and family is not None and family.kohya == "original"
