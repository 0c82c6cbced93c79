"""Models of diffusers, built on no device, and what its converters of checkpoints need."""

import re

import pytest
import torch

HEADS = {"num_attention_heads": 24, "joint_attention_dim": 96}
BLOCKS = {"num_layers": 2, "num_single_layers": 2}
AUDIO = {"audio_num_attention_heads": 2, "audio_attention_head_dim": 16, "audio_cross_attention_dim": 32}
LTX2 = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64} | AUDIO
GATED = {"gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True}
KREA2 = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "text_hidden_dim": 32,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 2,
    "text_intermediate_size": 48,
}
WAN = {"num_layers": 2, "num_attention_heads": 1, "ffn_dim": 256, "freq_dim": 64, "text_dim": 96}
IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128}
HUNYUAN = {"num_layers": 2, "text_embed_dim": 96}
# family -> the model class of diffusers, a small configuration (true widths where a converter has them built in), and
# the converter of original checkpoints, if diffusers has one
MODELS = {
    "sd3": (
        "SD3Transformer2DModel",
        {"num_layers": 3, "caption_projection_dim": 192, "num_attention_heads": 3, "joint_attention_dim": 96}
        | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        "convert_sd3_transformer_checkpoint_to_diffusers",
    ),
    "flux": (
        "FluxTransformer2DModel",
        HEADS | BLOCKS | {"guidance_embeds": True},
        "convert_flux_transformer_checkpoint_to_diffusers",
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        HEADS | BLOCKS | {"num_attention_heads": 1},
        "convert_flux2_transformer_checkpoint_to_diffusers",
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        HEADS | BLOCKS | {"approximator_layers": 2},
        "convert_chroma_transformer_checkpoint_to_diffusers",
    ),
    "anima": (
        "CosmosTransformer3DModel",
        {"num_layers": 2, "num_attention_heads": 16, "text_embed_dim": 96, "extra_pos_embed_type": None},
        "convert_cosmos_transformer_checkpoint_to_diffusers",
    ),
    "krea2": (
        "Krea2Transformer2DModel",
        KREA2 | {"num_layers": 2},
        "convert_krea2_transformer_checkpoint_to_diffusers",
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32},
        "convert_ltx_transformer_checkpoint_to_diffusers",
    ),
    "ltx LTX-2": ("LTX2VideoTransformer3DModel", LTX2, "convert_ltx2_transformer_to_diffusers"),
    # The converter of diffusers 0.42 does not know prompt_adaln_single; its converter of LoRA files does.
    "ltx LTX-2.3": ("LTX2VideoTransformer3DModel", LTX2 | GATED | {"use_prompt_embeddings": False}, ""),
    "lumina2": ("Lumina2Transformer2DModel", {"num_layers": 2, "cap_feat_dim": 96}, "convert_lumina2_to_diffusers"),
    "z_image": (
        "ZImageTransformer2DModel",
        {"n_layers": 2, "dim": 192, "n_heads": 6, "n_kv_heads": 6, "cap_feat_dim": 96, "axes_dims": [8, 12, 12]},
        "convert_z_image_transformer_checkpoint_to_diffusers",
    ),
    "qwen_image": ("QwenImageTransformer2DModel", HEADS | {"num_layers": 2}, ""),
    "wan": ("WanTransformer3DModel", WAN, "convert_wan_transformer_to_diffusers"),
    "wan of images": ("WanTransformer3DModel", WAN | IMAGE, "convert_wan_transformer_to_diffusers"),
    "wan VACE": (
        "WanVACETransformer3DModel",
        WAN | {"vace_layers": [0, 1], "vace_in_channels": 96},
        "convert_wan_transformer_to_diffusers",
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | BLOCKS,
        "convert_hunyuan_video_transformer_to_diffusers",
    ),
    "hunyuan_video_15": ("HunyuanVideo15Transformer3DModel", HUNYUAN | {"image_embed_dim": 72}, ""),
}
# Where shift and scale have changed places in diffusers.
SWAPPED = {
    "sd3": {"norm_out.linear", "transformer_blocks.2.norm1_context.linear"},
    "flux": {"norm_out.linear"},
    "flux2": {"norm_out.linear"},
    "hunyuan_video": {"norm_out.linear"},
    "hunyuan_video_15": {"norm_out.linear"},
}


def shapes_of(name, **changes):
    diffusers = pytest.importorskip("diffusers")
    kind, config, _ = MODELS[name]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config | changes)
    parameters = model.state_dict().items()
    return {key.removesuffix(".weight"): tuple(value.shape) for key, value in parameters if key.endswith(".weight")}


class Checkpoint(dict):
    """Weights; what else a converter wants (biases, norms, the last layer) it gets as zeros."""

    def __init__(self, weights):
        super().__init__(weights)
        self.sizes = {key.removesuffix(".weight"): len(weight) for key, weight in weights.items()}

    def pop(self, key, *default):
        return super().pop(key, torch.zeros(self.sizes.get(key.removesuffix(".bias"), 2)))


def original_shapes(family, shapes, aliases=False):
    """The shapes of the same model in the original naming, or in that of the aliases where there are some."""
    found = {}
    other = {paths: alias for alias, paths in family.aliases.items() if paths in family.modules.values()}
    for layer in family.layers(shapes):
        m = found.get(layer.original, (0,))[0] + layer.shape[0]
        found[layer.original] = (m, *layer.shape[1:])
    if not aliases:
        return found
    spelled = {original: other.get(paths, original) for original, paths in family.modules.items()}
    star = re.compile(r"(?<=\.)\d+(?=\.)")
    renamed = {}
    for path, shape in found.items():
        number = star.search(path)
        pattern = spelled.get(star.sub("*", path, count=1)) or spelled.get(path) or path
        renamed[pattern.replace("*", number.group() if number else "")] = shape
    return renamed


# Narrow: what a model of diffusers is here needs no true widths.
NARROW = {"num_attention_heads": 2, "attention_head_dim": 16}
SMALL = {
    "flux": NARROW | {"pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6)},
    "chroma": NARROW | {"approximator_hidden_dim": 32},
    "anima": NARROW,
    "krea2": {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "text_hidden_dim": 32},
    "sd3": NARROW | {"caption_projection_dim": 32, "pooled_projection_dim": 32},
    "wan": {"attention_head_dim": 32, "num_attention_heads": 2},
    "lumina2": {"hidden_size": 96, "num_attention_heads": 4, "num_kv_heads": 2, "axes_dim_rope": (8, 8, 8)},
    "qwen_image": NARROW,
    "hunyuan_video": NARROW | {"pooled_projection_dim": 32},
    "hunyuan_video_15": NARROW,
}
UNET = {
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
UNETS = {
    "sd1": UNET | {"cross_attention_dim": 768},
    "sd2": UNET | {"cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": UNET | {"cross_attention_dim": 2048, "use_linear_projection": True},
}


def model_of(name):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    if name in UNETS:
        return diffusers.UNet2DConditionModel(**UNETS[name])
    kind, config, _ = MODELS[name]
    return getattr(diffusers, kind)(**config | SMALL.get(name, {}))


def weights(model):
    """What `weight` has to return for each layer: the weights of more than one dimension."""
    return matrices(model.state_dict())


def matrices(tensors):
    return {key.removesuffix(".weight"): w for key, w in tensors.items() if key.endswith(".weight") and w.dim() > 1}


def original(family, model):
    """The weights of a model of diffusers as the original repository has them: parts stacked, in the order of rows.

    That the rows are the right ones is what test_tables.py asks diffusers' converters.
    """
    swap_scale_shift = pytest.importorskip("diffusers.loaders.single_file_utils").swap_scale_shift
    tensors = {}
    state = weights(model)
    layers = family.layers({path: tuple(weight.shape) for path, weight in state.items()})
    for layer in sorted(layers, key=lambda layer: layer.rows or (0, 0)):
        weight = state[layer.path]
        part = swap_scale_shift(weight, 0) if layer.swapped else weight
        tensors.setdefault(layer.original, []).append(part)
    return {f"{path}.weight": torch.cat(parts) for path, parts in tensors.items()}
