"""Parts of adapter files: one layer in every spelling, and factors for it."""

import torch
from safetensors.torch import save_file

from tests.tensors import randn

QKV = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LDM = "input_blocks.1.1.transformer_blocks.0.attn1"
MODULE = f"lora_unet_{QKV.replace('.', '_')}_to_q"
UP, DOWN = randn(320, 2), randn(2, 320)
SPELLINGS = {
    "kohya": (f"lora_unet_{QKV.replace('.', '_')}_to_q", "lora_up.weight", "lora_down.weight"),
    "kohya, ldm": (f"lora_unet_{LDM.replace('.', '_')}_to_q", "lora_up.weight", "lora_down.weight"),
    "diffusers": (f"unet.{QKV}.to_q", "lora_B.weight", "lora_A.weight"),
    "diffusers, bare": (f"{QKV}.to_q", "lora_B.weight", "lora_A.weight"),
    "diffusers, .lora.": (f"unet.{QKV}.to_q", "lora.up.weight", "lora.down.weight"),
    "diffusers, processor": (f"unet.{QKV}.processor.to_q_lora", "up.weight", "down.weight"),
    "diffusers, linear layer": (f"unet.{QKV}.to_q", "lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    "comfyui": (
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "lora_up.weight",
        "lora_down.weight",
    ),
    "peft": (f"base_model.model.{QKV}.to_q", "lora_B.weight", "lora_A.weight"),
    "peft, named": (f"base_model.model.{QKV}.to_q", "lora_B.default.weight", "lora_A.default.weight"),
}
FLUX = "lora_unet_double_blocks_3_img_attn"
GUARD = {f"{FLUX}_proj.lora_up.weight": torch.ones(8, 2), f"{FLUX}_proj.lora_down.weight": torch.ones(2, 8)}
# FLUX.1 and HunyuanVideo have it, the latter without T5.
MODULATION = "lora_unet_single_blocks_3_modulation_lin"
GUARD |= {f"{MODULATION}.lora_up.weight": torch.ones(24, 2), f"{MODULATION}.lora_down.weight": torch.ones(2, 8)}


def saved(path, tensors, **kwargs):
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, **kwargs)
    return path
