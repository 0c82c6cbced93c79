"""DoRA: an update whose result has magnitudes of its own, one for each output or each input (arXiv 2402.09353)."""

import torch
from torch import Tensor


def decomposed(update: Tensor, weight: Tensor, dora_scale: Tensor) -> Tensor:
    """Return `dora_scale * (W + update) / ||W + update|| - W`: what a magnitude makes of an update (DoRA, eq. 5).

    The norm is that of the changed weight, as in the paper, in LyCORIS and in PEFT. ComfyUI divides by the norm of the
    unchanged weight where the magnitude is per output.

    Args:
        update: The update before the magnitude, in the shape of `weight`.
        weight: `[out, in]` or `[out, in, kh, kw]`.
        dora_scale: `[out, 1, ...]` or `[1, in, ...]`: the norm of each output row, or of each input column.
    """
    merged = weight + update
    return merged * (dora_scale / magnitude(merged, dora_scale)) - weight


def magnitude(weight: Tensor, dora_scale: Tensor) -> Tensor:
    """Return the norms of a weight that `dora_scale` stands for, in its shape; never 0."""
    kept = 0 if per_output(dora_scale, weight) else 1
    axes = [axis for axis in range(weight.dim()) if axis != kept]
    return torch.linalg.vector_norm(weight, dim=axes, keepdim=True) + torch.finfo(weight.dtype).eps


def per_output(dora_scale: Tensor, weight: Tensor) -> bool:
    """Return whether a magnitude of this shape is one for each output of a weight, and not for each input."""
    return dora_scale.shape[0] == weight.shape[0] and dora_scale.numel() == dora_scale.shape[0]


def with_magnitude_of(dora_scale: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Return the magnitude for another base, its ratio kept: `dora_scale * ||W_t|| / ||W_s||`, by row (or column).

    With the direction factors left as they are, the change of each row's length in percent is the one that was trained.
    A strength acts on the result as on any update, in ComfyUI: `W + strength * (W' - W)`.

    Args:
        dora_scale: `[out, 1, ...]` or `[1, in, ...]`.
        source: The weight that it was trained on, `[out, in]` or `[out, in, kh, kw]`.
        target: The weight of the other base, in the same shape.

    Returns:
        The magnitude in the dtype and shape of `dora_scale`, computed in float32 or better.
    """
    dtype = torch.promote_types(source.dtype, torch.float32)
    source, target, scale = source.to(dtype), target.to(dtype), dora_scale.to(source.device, dtype)
    return (scale * magnitude(target, scale) / magnitude(source, scale)).to(dora_scale.device, dora_scale.dtype)
