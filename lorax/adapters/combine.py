"""Several updates as one: of the parts of a fused weight, or of one layer; and rows in another order."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import FormatError
from ..models.layers import Layer
from .diff import DiffLayer
from .layer import AdapterLayer, stacked
from .lora import LoraLayer, added, fuse

Rows = tuple[int, int]


def whole(parts: Sequence[AdapterLayer], rows: Sequence[Rows], layer: Layer) -> AdapterLayer | None:
    """Return the update of a fused weight, zero outside of its parts; None where it has no exact form of their kind.

    Args:
        parts: The updates, in the order of their rows.
        rows: The rows of each in the fused weight.
        layer: The fused layer.
    """
    inner = replace(layer, shape=(sum(part.layer.shape[0] for part in parts), *layer.shape[1:]))
    loras = [part for part in parts if isinstance(part, LoraLayer)]
    if any(part.row_axes() is None for part in parts):
        return None
    alike = len(loras) == len(parts) and len({part.kind for part in loras}) == 1
    found = fuse(loras, inner) if alike else stacked(parts, inner)
    if found is None or inner.shape == layer.shape:
        return found
    return None if found.needs_weight else _spread(found, rows, layer)


def total(first: AdapterLayer, second: AdapterLayer) -> AdapterLayer:
    """Return the sum of two updates of one layer.

    Raises:
        FormatError: One depends on the weight, so that which comes first would count.
    """
    if isinstance(first, LoraLayer) and isinstance(second, LoraLayer) and first.is_thin and second.is_thin:
        return added(first, second)
    if first.needs_weight or second.needs_weight:
        got = f"{first.layer.name}, {first.kind} and {second.kind}"
        raise FormatError("two updates for one layer that do not add up", got, "take one out of the file")
    return DiffLayer(first.layer, (first.delta_weight() + second.delta_weight()).reshape(first.layer.shape))


def with_halves_swapped(update: AdapterLayer) -> AdapterLayer:
    """Return an update with the upper and the lower half of its rows changed.

    Raises:
        FormatError: It depends on the weight in a way that is not by rows.
    """
    axes = update.row_axes()
    if axes is not None:
        halves = {
            name: torch.cat(update.parts()[name].chunk(2, axis)[::-1], axis)
            for name, axis in axes.items()
            if name in update.parts()
        }
        changes: dict[str, Any] = halves
        return replace(update, **changes)
    if update.needs_weight:
        got = f"{update.layer.name} ({update.kind})"
        raise FormatError("an update whose shift and scale cannot change places", got, "merge it with its own program")
    delta_weight = update.delta_weight()
    swapped = torch.cat(delta_weight.chunk(2)[::-1])
    return DiffLayer(update.layer, swapped.reshape(update.layer.shape or swapped.shape))


def _spread(update: AdapterLayer, rows: Sequence[Rows], layer: Layer) -> AdapterLayer:
    """Return an update of some rows as one of all, with zeros elsewhere."""
    changes: dict[str, Any] = {"layer": layer}
    sizes = [stop - start for start, stop in rows]
    for name, axis in (update.row_axes() or {}).items():
        if name in (parts := update.parts()):
            part = parts[name]
            shape = list(part.shape)
            shape[axis] = layer.shape[0]
            spread = torch.zeros(shape, dtype=part.dtype)
            for (start, _), piece in zip(rows, part.split(sizes, axis), strict=True):
                spread.narrow(axis, start, piece.shape[axis]).copy_(piece)
            changes[name] = spread
    return replace(update, **changes)
