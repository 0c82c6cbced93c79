"""Training on a MODEL: its loss, at random times of its own noise schedule."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import comfy.model_management as management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor, nn

from ...lorax.errors import OptionError
from ...lorax.train import LoraXLayers
from .gradients import copies, differentiable, recomputing, teach_rotations
from .types import Caption, Model

# What makes a conditioning more than a caption of a whole picture.
REGIONAL = {"control", "gligen", "hooks", "area", "mask", "start_percent", "end_percent"}
# Asks the host for all of the device.
ALL_MEMORY = 1e20


@contextmanager
def training(
    model: Model,
    pictures: Sequence[tuple[Tensor, Caption]],
    attach: Callable[[nn.Module], LoraXLayers],
    *,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
) -> Generator[tuple[LoraXLayers, Callable[[Sequence[int]], Tensor]]]:
    """Load a MODEL whole, attach to it what shall learn, and let it take part in backward passes.

    Args:
        model: MODEL; the copy that is trained has its patches.
        pictures: A latent `[1, ...]` as the VAE gives it, and an entry of a CONDITIONING, each.
        attach: Called with the module that denoises; what it returns is detached at the end, as a context.
        dtype: To compute in.
        gradient_checkpointing: Whether to compute each block again in the backward pass instead of keeping its inside.

    Yields:
        What `attach` returned, and a function that returns the loss of some of the pictures, by number, all of one
        size: the mean square error of what this model predicts (noise, velocity or flow), at random times of its own
        noise schedule.

    Raises:
        OptionError: A conditioning has areas, masks, times, or a ControlNet.
    """
    teach_rotations()
    with torch.inference_mode(False), ExitStack() as stack:
        patcher = model.clone()
        patcher.set_model_compute_dtype(dtype)
        stack.callback(management.soft_empty_cache)
        management.load_models_gpu([patcher], memory_required=ALL_MEMORY, force_full_load=True)
        patcher.pre_run()
        stack.callback(patcher.cleanup)
        stack.enter_context(differentiable(patcher.model))
        layers = stack.enter_context(attach(patcher.model.diffusion_model))
        saved = copies([patcher.model, layers])
        if gradient_checkpointing:
            stack.enter_context(recomputing(patcher.model.diffusion_model, saved))
        data = [_picture(patcher, latent, entry) for latent, entry in pictures]

        def loss(chosen: Sequence[int]) -> Tensor:
            with saved():
                return _loss(patcher, [data[i] for i in chosen], dtype)

        yield layers, loss


def _picture(patcher: Model, latent: Tensor, entry: Caption) -> tuple[Tensor, Any]:
    """Return a latent as the model sees it, `[1, ...]`, and its conditioning as the model reads it."""
    if strange := sorted(REGIONAL & entry[1].keys()):
        raise OptionError("a picture to train on has one plain caption", ", ".join(strange), "connect a plain prompt")
    latent = patcher.model.process_latent_in(latent.clone().to(patcher.load_device, torch.float32))
    conds = {"positive": comfy.sampler_helpers.convert_cond([_cloned(entry)])}
    noise = torch.zeros_like(latent)
    conds = comfy.samplers.process_conds(patcher.model, noise, conds, patcher.load_device, latent_image=latent, seed=0)
    return latent, conds["positive"][0]


def _cloned(value: Any) -> Any:
    """Return a copy of a conditioning whose tensors may take part in a backward pass."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(part) for key, part in value.items()}
    return type(value)(map(_cloned, value)) if type(value) in (list, tuple) else value


def _loss(patcher: Model, pictures: Sequence[tuple[Tensor, Any]], dtype: torch.dtype) -> Tensor:
    sampling = patcher.model.model_sampling
    latent = torch.cat([latent for latent, _ in pictures])
    times = torch.rand(len(pictures))
    sigma = torch.tensor([float(sampling.percent_to_sigma(float(time))) for time in times])
    sigma = sigma.clamp(float(sampling.sigma_min), float(sampling.sigma_max)).to(latent)
    noisy = sampling.noise_scaling(sigma, torch.randn(latent.shape).to(latent), latent, False)
    with _computing_in(dtype, latent.device.type):
        denoised = _denoised(patcher, noisy, sigma, [cond for _, cond in pictures])
    # What a prediction of 1 changes: the error of the denoised latent, divided by it, is that of the prediction.
    one = torch.ones_like(latent[:, :1])
    slope = sampling.calculate_denoised(sigma, one, one * 0) - sampling.calculate_denoised(sigma, one * 0, one * 0)
    return ((denoised - latent) / slope).square().mean()


def _denoised(patcher: Model, noisy: Tensor, sigma: Tensor, conds: Sequence[Any]) -> Tensor:
    """Return what the model makes of noisy latents, each with its own conditioning; what fits together at once."""
    parts = [comfy.samplers.get_area_and_mult(cond, noisy[i : i + 1], sigma[i : i + 1]) for i, cond in enumerate(conds)]
    found: dict[int, Tensor] = {}
    while waiting := [i for i in range(len(parts)) if i not in found]:
        some = [i for i in waiting if comfy.samplers.can_concat_cond(parts[waiting[0]], parts[i])]
        options = dict(patcher.model_options.get("transformer_options", {}))
        options |= {"cond_or_uncond": [0] * len(some), "uuids": [parts[i].uuid for i in some], "sigmas": sigma[some]}
        cond = comfy.samplers.cond_cat([parts[i].conditioning for i in some])
        out = patcher.model.apply_model(noisy[some], sigma[some], transformer_options=options, **cond)
        found |= {i: out[place] for place, i in enumerate(some)}
    return torch.stack([found[i] for i in range(len(parts))])


def _computing_in(dtype: torch.dtype, device: str) -> AbstractContextManager[Any]:
    """Return a context that casts to a dtype; where the device has none, what the host itself casts must do."""
    casts = dtype != torch.float32 and torch.amp.is_autocast_available(device)
    return torch.autocast(device, dtype) if casts else nullcontext()
