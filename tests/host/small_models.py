"""One small model of each kind: our family and a word -> the host's class and its configuration."""

import torch

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_head_channels": 64,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
LEVELS4 = {
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}
XL = UNET | {
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
}
DIT = {"hidden_size": 128, "num_heads": 1, "mlp_ratio": 4.0, "depth": 2, "depth_single_blocks": 2, "qkv_bias": True}
FLUX = DIT | {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 48,
    "context_in_dim": 96,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "txt_ids_dims": [],
}
ANIMA = {
    "image_model": "cosmos_predict2",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 2048,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 96,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 32,
    "num_blocks": 2,
    "num_heads": 16,
    "extra_per_block_abs_pos_emb": False,
}
LTX = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
AUDIO = {"audio_num_attention_heads": 2, "audio_attention_head_dim": 16, "audio_cross_attention_dim": 32}
LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 192,
    "cap_feat_dim": 96,
    "n_layers": 2,
    "qk_norm": True,
    "n_heads": 6,
    "n_kv_heads": 2,
    "axes_dims": [8, 12, 12],
    "axes_lens": [30, 51, 51],
}
Z_IMAGE = {"n_kv_heads": 6, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 128,
    "in_dim": 16,
    "out_dim": 16,
    "num_heads": 1,
    "ffn_dim": 256,
    "num_layers": 2,
    "freq_dim": 64,
    "text_dim": 96,
}
HUNYUAN = DIT | {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": 48,
    "context_in_dim": 96,
    "axes_dim": [16, 56, 56],
    "theta": 256,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
# our family and a word -> the host's class and configuration
MODELS = {
    "sd1": ("SD15", UNET | LEVELS4 | {"context_dim": 768, "use_linear_in_transformer": False}),
    "sd2": ("SD20", UNET | LEVELS4 | {"context_dim": 1024, "use_linear_in_transformer": True}),
    "sdxl": (
        "SDXL",
        XL
        | {"transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
        | {"transformer_depth_middle": 10},
    ),
    "sdxl SSD-1B": (
        "SSD1B",
        XL
        | {"transformer_depth": [0, 0, 2, 2, 4, 4], "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4]}
        | {"transformer_depth_middle": -1},
    ),
    "sdxl KOALA-700M": (
        "KOALA_700M",
        XL
        | {"num_res_blocks": [1, 1, 1], "transformer_depth": [0, 2, 5], "transformer_depth_output": [0, 0, 2, 2, 5, 5]}
        | {"transformer_depth_middle": -2},
    ),
    "sd3": (
        "SD3",
        {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 3, "input_size": None, "adm_in_channels": 48}
        | {"context_embedder_config": {"target": "Linear", "params": {"in_features": 96, "out_features": 192}}}
        | {"num_patches": 64, "pos_embed_max_size": 8, "pos_embed_scaling_factor": None, "qk_norm": "rms"}
        | {"x_block_self_attn_layers": [0, 1]},
    ),
    "flux": ("Flux", FLUX | {"guidance_embed": True}),
    "flux2": (
        "Flux2",
        FLUX
        | {"image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "mlp_ratio": 3.0}
        | {"vec_in_dim": None, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False}
        | {"axes_dim": [32, 32, 32, 32], "guidance_embed": True},
    ),
    "chroma": (
        "Chroma",
        FLUX
        | {"image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 128}
        | {"vec_in_dim": None, "hidden_dim": 160, "n_layers": 2},
    ),
    "anima": ("CosmosT2IPredict2", ANIMA),
    "ltx": ("LTXV", LTX | {"image_model": "ltxv", "caption_channels": 96}),
    "ltx LTX-2": ("LTXAV", LTX | AUDIO | {"image_model": "ltxav", "caption_channels": 96}),
    "lumina2": ("Lumina2", LUMINA | {"ffn_dim_multiplier": 4.0}),
    "z_image": ("ZImage", LUMINA | Z_IMAGE),
    "qwen_image": (
        "QwenImage",
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 16}
        | {"num_attention_heads": 2, "joint_attention_dim": 96},
    ),
    "krea2": (
        "Krea2",
        {"image_model": "krea2", "features": 128, "heads": 4, "kvheads": 1, "channels": 16, "layers": 2, "tdim": 64}
        | {"txtdim": 64, "txtheads": 2, "txtkvheads": 2, "txtlayers": 3},
    ),
    "wan": ("WAN21_T2V", WAN),
    "wan of images": ("WAN21_I2V", WAN | {"model_type": "i2v", "in_dim": 36}),
    "wan VACE": ("WAN21_Vace", WAN | {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}),
    "hunyuan_video": ("HunyuanVideo", HUNYUAN),
    "hunyuan_video_15": (
        "HunyuanVideo15",
        HUNYUAN
        | {"in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "depth_single_blocks": 0}
        | {"vec_in_dim": None, "guidance_embed": False, "byt5": True, "use_cond_type_embedding": True}
        | {"vision_in_dim": 72, "meanflow_sum": True},
    ),
}

# As small as the layers can be, for what is done with their weights: the names, and the proportions of the layers, are
# those of the full size.
THIN = {"model_channels": 32, "num_head_channels": 32}
XL_THIN = THIN | {"transformer_depth": [0, 0, 1, 1, 2, 2], "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2]}
SMALLER = {
    "sd1": THIN,
    "sd2": {"model_channels": 64},
    "sdxl": XL_THIN | {"transformer_depth_middle": 2},
    "sdxl SSD-1B": XL_THIN | {"transformer_depth_output": [0, 0, 0, 1, 1, 2, 3, 2, 2]},
    "anima": {"model_channels": 256, "num_heads": 2},
}
LEFT_OUT = {"sdxl KOALA-700M", "ltx LTX-2", "wan of images", "wan VACE"}
SMALLEST = {
    name: (kind, config | SMALLER.get(name, {})) for name, (kind, config) in MODELS.items() if name not in LEFT_OUT
}


def build(kinds, kind, config, device):
    """Build a model in float32, without the settings that this version of the host does not have; None if unknown.

    Args:
        kinds: The host's `comfy.supported_models`.
        kind: Name of a class of it.
        config: Its configuration.
        device: Where the weights shall be; `meta` is nowhere.
    """
    known = getattr(kinds, kind, None)
    if known is None:
        return None
    config = dict(config)
    while True:
        try:
            chosen = known(dict(config))
            chosen.set_inference_dtype(torch.float32, None)
            return chosen.get_model({}, device=torch.device(device))
        except TypeError as error:
            name = str(error).split("'")[1] if "unexpected keyword" in str(error) else ""
            if name not in config:
                raise
            del config[name]
