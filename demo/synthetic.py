"""Base models and adapters made from a seed: the real layers' names and shapes, and a realistic falling spectrum.

They stand in for published models, which no registry ships. Their pictures would be noise; their algebra is real.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorax.models.family import Family, TextEncoder
from lorax.models.unet import UNetConfig
from lorax.models.unetfamily import UNetFamily

# SSD-1B (arXiv 2401.02677): SDXL with more than half of its transformer blocks and the middle one taken out.
SSD_1B = {
    "depths_down": ((0, 0), (2, 2), (4, 4)),
    "depths_up": ((4, 4, 10), (2, 1, 1), (0, 0, 0)),
    "transformer_depth_middle": -1,
}
# Singular values of trained attention weights fall roughly like a power of their index; measured on the released
# MiniLM and terrain models the exponent lies between 0.3 and 0.8.
DECAY = 0.5


def falling(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return a random weight whose singular values fall like `i^-DECAY`, of spectral norm around 1."""
    m, n = shape[0], math.prod(shape[1:])
    p = min(m, n)
    spectrum = torch.arange(1, p + 1, dtype=torch.float32).pow(-DECAY)
    left = torch.randn(m, p, generator=generator) / math.sqrt(m)
    right = torch.randn(p, n, generator=generator) / math.sqrt(n)
    return ((left * spectrum) @ right).reshape(shape)


def unet_of(family: Family) -> UNetConfig:
    """Return the U-Net of a family that has one."""
    assert isinstance(family, UNetFamily), family.label
    return family.unet


def resized(family: Family, **unet: Any) -> Family:
    """Return a family whose U-Net has other sizes, without text encoders."""
    return replace(family, unet=replace(unet_of(family), **unet), text_encoders=())


def base_tensors(
    family: Family, seed: int, *, change: float = 0.0, dtype: torch.dtype = torch.float16, text_encoders: bool = True
) -> dict[str, Tensor]:
    """Return all tensors of a single-file checkpoint in the original naming.

    Args:
        family: Whose names and shapes; `resized` gives narrower models.
        seed: Equal seeds give equal models.
        change: Relative size of the noise that is added to each weight, as a fine-tune changes its base.
        dtype: Of the tensors.
        text_encoders: Whether to add the CLIP encoders' linear layers.
    """
    first, second = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)

    def weight(key: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, 0.0 if key.endswith("bias") else 1.0, dtype=dtype)
        matrix = falling(shape, first)
        if change:
            noise = torch.randn(shape, generator=second)
            matrix += noise.mul_(change * matrix.norm() / math.sqrt(matrix.numel()))
        return matrix.to(dtype)

    shapes = {f"model.diffusion_model.{key}": shape for key, shape in unet_of(family).parameters().items()}
    for encoder in family.text_encoders if text_encoders else ():
        shapes |= {f"{encoder.checkpoint[0]}{key}": shape for key, shape in _text_parameters(encoder).items()}
    return {key: weight(key, shape) for key, shape in shapes.items()}


def write_base(path: Path, family: Family, seed: int, **options: Any) -> None:
    """Write `base_tensors` to a file."""
    save_file(base_tensors(family, seed, **options), path)


def _text_parameters(encoder: TextEncoder) -> dict[str, tuple[int, ...]]:
    if encoder.kind not in ("clip_g", "clip_h"):  # those lie in checkpoints as OpenCLIP spells them
        return {f"{path}.weight": shape for path, shape in encoder.shapes().items()}
    width, found = encoder.width, {}
    for i in range(encoder.depth):
        block = f"transformer.resblocks.{i}"
        found[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        found[f"{block}.attn.out_proj.weight"] = (width, width)
        found[f"{block}.mlp.c_fc.weight"] = (4 * width, width)
        found[f"{block}.mlp.c_proj.weight"] = (width, 4 * width)
    return found
