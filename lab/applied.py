"""Putting updates on the weights of a model, and taking them off again."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from lorax import Adapter, Base
from lorax.adapters import expand
from lorax.models.base import module_place

Deltas = Mapping[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def changed(model: Model, deltas: Deltas, base: Base) -> Generator[Model]:
    """Add updates to the weights, for as long as the `with` lasts."""
    modules = dict(model.named_modules())
    weights = {name: modules[module_place(base.layers[name], modules)[0]].get_parameter("weight") for name in deltas}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight += deltas[name].reshape(weight.shape).to(weight.device)
    try:
        yield model
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])


def dense(adapter: Adapter, source: Base) -> dict[str, Tensor]:
    """Return the update of every layer."""
    found: dict[str, Tensor] = {}
    for name, own in adapter.layers.items():
        B, A = expand(own, source)
        found[name] = B @ A
    return found
