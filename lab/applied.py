"""Putting updates on the weights of a model, and taking them off again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorax import Adapter, Base
from lorax.adapters import expand
from lorax.models.base import module_place

Deltas = Mapping[str, Tensor]


@contextmanager
def changed(model: nn.Module, deltas: Deltas, base: Base) -> Iterator[nn.Module]:
    """Add updates to the weights, for as long as the `with` lasts."""
    modules = dict(model.named_modules())
    weights = {name: modules[module_place(base.layers[name], modules)[0]].weight for name in deltas}
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
