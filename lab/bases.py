"""The base models: a source, its fine-tune, its pruned and distilled version, and one of another width.

`source` learns Google's pictures from scratch. `fine-tune` goes on with Twitter's (as RealVis does from SD 1.5); `near`
goes on with both vendors' at a smaller rate, a fine-tune that stays close.
`pruned` has one transformer block of every two and learns what `source` says (as SSD-1B from SDXL). `narrow` is two
thirds as wide, learns Google's pictures from scratch, and shares nothing with the source but the data.
"""

import math
from functools import cache

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lorax.train import train

from . import FIRST, MODELS, weights
from .data import load
from .model import error, loss, noised, predict, some_dropped, unet

STEPS = {"source": 2400, "fine-tune": 400, "near": 150, "pruned": 800, "narrow": 3000}
# For models as wide as the first ones; wider ones learn slower in proportion.
LEARNING_RATES = {"source": 2e-3, "fine-tune": 5e-4, "near": 2e-4, "pruned": 1e-3, "narrow": 2e-3}
STYLES = {
    "source": ("google",),
    "fine-tune": ("twitter",),
    "near": ("google", "twitter"),
    "pruned": ("google",),
    "narrow": ("google",),
}


def base(name: str) -> UNet2DConditionModel:
    """Return a base model; trained on the first call where no checkpoint lies in the repository.

    Args:
        name: One of SIZES.
    """
    model = unet(name)
    model.load_state_dict(_weights(name))
    return model.eval().requires_grad_(False)


@cache
def _weights(name: str) -> dict[str, Tensor]:
    # Half precision is what is shipped, so it is what is measured.
    found = weights(name, lambda: {key: value.half() for key, value in _trained(name).items()})
    return {key: value.float() for key, value in found.items()}


def _trained(name: str) -> dict[str, Tensor]:
    torch.manual_seed(len(name) + 100 * MODELS.seed)
    model, data, steps = unet(name), load(), STEPS[name]
    rate = LEARNING_RATES[name] * FIRST.width / MODELS.width
    pictures, tokens = torch.cat([data.pictures[s] for s in STYLES[name]]), data.tokens.repeat(len(STYLES[name]), 1, 1)
    teacher = base("source") if name in ("fine-tune", "near", "pruned") else None
    if teacher is not None:
        kept = {key: value for key, value in teacher.state_dict().items() if key in model.state_dict()}
        model.load_state_dict(kept)

    def step(call: int) -> Tensor:
        for group in optimizers[0].param_groups:
            group["lr"] = rate * min(1, (call + 1) / 100) * (1 + math.cos(math.pi * call / steps)) / 2
        chosen = torch.randint(len(pictures), (MODELS.batch,))
        if teacher is None or name != "pruned":
            return loss(model, pictures[chosen], tokens[chosen])
        x_t, t, x = noised(pictures[chosen])
        text = some_dropped(tokens[chosen])
        with torch.no_grad():
            told = predict(teacher, x_t, t, text)
        said = predict(model, x_t, t, text)
        return (error(said, told, t) + error(said, x, t)).mean()

    optimizers: list[torch.optim.Optimizer] = []

    def optimizer(parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2))
        return optimizers[0]

    def tell(step: int, value: float) -> None:
        if step % 100 == 0:
            print(f"{name}: step {step} of {steps}, loss {value:.4f}", flush=True)

    train(model, step, steps, learning_rate=rate, optimizer=optimizer, seed=MODELS.seed, on_step=tell)
    return model.state_dict()
