"""A base and a pruned copy with known pairs of blocks: SDXL and SSD-1B with their real names, reduced in width."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorax import Base, open_base
from lorax.compare.matching import Assignment
from lorax.models.families import families

from .synthetic import SSD_1B, base_tensors, resized, unet_of

PREFIX = "model.diffusion_model."
BLOCK = re.compile(r"(.*\.transformer_blocks\.)(\d+)(\..*)")


def noisy(weight: Tensor, change: float, generator: torch.Generator) -> Tensor:
    """Return a weight with white noise of `change` times its norm added."""
    noise = torch.randn(weight.shape, generator=generator)
    return (weight.float() + change * noise * weight.float().norm() / noise.norm()).to(weight.dtype)


def pruned_pair(
    folder: Path, change: float, channels: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Base, Base, dict[str, str]]:
    """Make SDXL, and SSD-1B as SDXL with transformer blocks taken out at random and every weight changed.

    Args:
        folder: Where the two files go.
        change: Norm of the noise that is added to each weight, in norms of the weight.
        channels: Width of the first level; 320 in the real models.
        seed: Equal seeds give equal models.
        dtype: Of the files.

    Returns:
        The source, the target, and for each module of the target (original path) that of the source that it was.
    """
    family = resized(families()["sdxl"], model_channels=channels)
    pruned = resized(family, **SSD_1B)
    generator = torch.Generator().manual_seed(seed)
    source = base_tensors(family, 2 * seed + 1, dtype=dtype)
    kept: dict[str, list[int]] = {}
    target: dict[str, Tensor] = {}
    truth: dict[str, str] = {}
    shapes = {PREFIX + key: shape for key, shape in unet_of(pruned).parameters().items()}
    for key, shape in shapes.items():
        place = key
        if found := BLOCK.fullmatch(key):
            container, block, rest = found.groups()
            if container not in kept:
                order = torch.randperm(_depth(source, container), generator=generator)
                kept[container] = sorted(order[: _depth(shapes, container)].tolist())
            place = f"{container}{kept[container][int(block)]}{rest}"
            truth[key.removeprefix(PREFIX).removesuffix(".weight")] = place.removeprefix(PREFIX).removesuffix(".weight")
        target[key] = noisy(source[place], change, generator) if len(shape) > 1 else source[place]
    paths = folder / "source.safetensors", folder / "target.safetensors"
    for path, tensors in zip(paths, (source, target), strict=True):
        save_file(tensors, path)
    return open_base(paths[0]), open_base(paths[1]), truth


def accuracy(assignment: Assignment, source: Base, target: Base, truth: Mapping[str, str]) -> float:
    """Return the share of the target's attention projections in blocks that were paired with the layer they were."""
    layers = [layer for layer in target.layers.values() if layer.is_attention and layer.original in truth]
    fed = [(truth[layer.original], source.layers.get(assignment.source_of(layer.name))) for layer in layers]
    return sum(found is not None and found.original == expected for expected, found in fed) / len(fed)


def _depth(tensors: Mapping[str, object], container: str) -> int:
    return sum(key.startswith(container) and key.endswith(".norm1.weight") for key in tensors)
