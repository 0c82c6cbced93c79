"""The models: diffusers' U-Net, small, with Stable Diffusion's layer names; flow matching.

A picture goes in as 48 channels of its side / 4 (every 4 x 4 pixels are one place). `x_t = (1 - t) x + t noise`
(rectified flow, arXiv 2209.03003). The model predicts the picture `x`: noise would not fit through so few channels.
"""

import itertools
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from . import DEVICE, MODELS

PATCH, DROPPED, GUIDANCE, STEPS, LEAST = 4, 0.1, 2.0, 10, 0.2
SIDE = MODELS.pixels // PATCH
# width of the first level, transformer blocks in each attention module
SIZES = {
    "source": (MODELS.width, 2),
    "fine-tune": (MODELS.width, 2),
    "near": (MODELS.width, 2),
    "pruned": (MODELS.width, 1),
    "narrow": (MODELS.narrow, 2),
}


def unet(name: str) -> UNet2DConditionModel:
    """Return a new model, random weights from torch's global generator.

    Args:
        name: One of SIZES.
    """
    width, blocks = SIZES[name]
    model = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        block_out_channels=(width, 2 * width),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=blocks,
        cross_attention_dim=768,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    nn.Module.to(model, DEVICE)  # that of diffusers is wrapped, without its types
    return model


def predict(model: nn.Module, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
    """Return the picture seen in `x [b, 48, SIDE, SIDE]` at `t [b]`, 0 to 1, for captions `tokens [b, 12, 768]`."""
    return model(x, 1000 * t, tokens, return_dict=False)[0]


def noised(pictures: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return `x_t`, `t` (logit-normal) and the `x` to predict, for pictures `[b, 3, 4 SIDE, 4 SIDE]`."""
    x = pixel_unshuffle(pictures, PATCH)
    t = torch.sigmoid(_normal(len(x), generator=generator))
    noise = _normal(*x.shape, generator=generator)
    mix = t[:, None, None, None]
    return (1 - mix) * x + mix * noise, t, x


def error(predicted: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Return the squared error of the flow `(x_t - x) / t`, `[b]`; less noise than LEAST counts as LEAST."""
    return (predicted - x).square().mean((1, 2, 3)) / t.clamp_min(LEAST).square()


def loss(model: nn.Module, pictures: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean error; a tenth of the captions is left out, for guidance."""
    x_t, t, x = noised(pictures)
    return error(predict(model, x_t, t, some_dropped(tokens)), x, t).mean()


def some_dropped(tokens: Tensor) -> Tensor:
    """Return captions `[b, 12, 768]` of which a tenth is left out."""
    return tokens * (torch.rand(len(tokens), device=DEVICE) >= DROPPED)[:, None, None]


@torch.no_grad()
def held_out_loss(model: UNet2DConditionModel, pictures: Tensor, tokens: Tensor, repeats: int = 4) -> float:
    """Return the loss on pictures that were not learnt from, always with the same noise."""
    generator = torch.Generator().manual_seed(1)
    known = *noised(pictures.repeat(repeats, 1, 1, 1), generator), tokens.repeat(repeats, 1, 1)
    parts = zip(*(part.split(128) for part in known), strict=True)
    return float(torch.cat([error(predict(model, x_t, t, text), x, t) for x_t, t, x, text in parts]).mean())


@torch.no_grad()
def generate(models: Sequence[UNet2DConditionModel], tokens: Tensor, seed: int = 0, steps: int = STEPS) -> Tensor:
    """Draw pictures `[b, 3, 4 SIDE, 4 SIDE]` in -1 to 1 by Euler's rule with classifier-free guidance.

    Args:
        models: The model; more than one runs beside it at each step, as X-Adapter's source does (only their cost
            counts, their output is not used).
        tokens: `[b, 12, 768]`.
        seed: Of the noise.
        steps: Of the sampler.
    """
    x = _normal(len(tokens), 3 * PATCH**2, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([tokens, torch.zeros_like(tokens)])
    times = torch.linspace(1, 0, steps + 1, device=DEVICE)
    for t, after in itertools.pairwise(times):
        seen = [predict(model, x.repeat(2, 1, 1, 1), t.expand(len(both)), both) for model in models]
        told, untold = seen[0].chunk(2)
        x = x + (after - t) / t * (x - (untold + GUIDANCE * (told - untold)))
    return pixel_shuffle(x, PATCH).clamp(-1, 1)


def _normal(*shape: int, generator: torch.Generator | None) -> Tensor:
    """Return noise; that of a generator is the same on every device."""
    return torch.randn(*shape, generator=generator, device=DEVICE if generator is None else "cpu").to(DEVICE)
