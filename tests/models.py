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
