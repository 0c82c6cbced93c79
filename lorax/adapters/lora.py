"""LoRA: two thin factors (arXiv 2106.09685); with a magnitude, DoRA (arXiv 2402.09353)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from ..models.layers import Layer
from .layer import WEIGHT, AdapterLayer, Parts, ScaledLayer, Shape, Shapes, misfit, stacked, times


@dataclass(frozen=True, slots=True, eq=False)
class LoraLayer(ScaledLayer):
    """The update of one layer as two factors: `delta_weight = alpha / rank * lora_up @ lora_down`.

    With `lora_mid` (LyCORIS, "tucker" or CP form of a convolution):
    `delta_weight[i, j, y, x] = alpha / rank * sum_pq lora_up[i, p] lora_mid[p, q, y, x] lora_down[q, j]`.
    With `dora_scale`: see `lorax.adapters.dora`.

    Attributes:
        lora_up: `[m, k]`, or `[m, k, 1, 1]` for a convolution.
        lora_down: `[k, n]`, or `[k, in, kh, kw]` for a convolution (`[k, in, 1, 1]` with `lora_mid`).
        alpha: The numerator of the scale; None means a scale of 1.
        lora_mid: `[k, k, kh, kw]`, or None.
        dora_scale: The magnitude, `[out, 1, ...]` or `[1, in, ...]`, or None.
    """

    KIND: ClassVar = "lora"
    KEYS: ClassVar = {"lora_up": "lora_up.weight", "lora_down": "lora_down.weight", "lora_mid": "lora_mid.weight"}
    REQUIRED: ClassVar = frozenset({"lora_up", "lora_down"})
    OPTIONAL: ClassVar = frozenset({"lora_mid", "dora_scale"})
    INNER: ClassVar = frozenset({"lora_down"})

    lora_up: Tensor
    lora_down: Tensor
    alpha: float | None = None
    lora_mid: Tensor | None = None
    dora_scale: Tensor | None = None

    @classmethod
    @override
    def shape_of(cls, shapes: Shapes) -> Shape:
        up, down, mid = shapes["lora_up"], shapes["lora_down"], shapes.get("lora_mid")
        if len(up) < 2 or len(down) < 2 or up[1] != down[0] or any(size != 1 for size in up[2:]):
            raise misfit(cls.KIND, shapes, "which are not two factors of one update")
        if mid is None:
            return up[0], *down[1:]
        if len(mid) < 3 or mid[:2] != (up[1], up[1]) or any(size != 1 for size in down[2:]):
            raise misfit(cls.KIND, shapes, "whose lora_mid does not fit between the factors")
        if math.prod((*down[:2], *mid[2:])) > WEIGHT:  # what becomes of the two
            raise misfit(cls.KIND, shapes, f"whose lora_mid makes a factor of more than {WEIGHT} numbers")
        return up[0], down[1], *mid[2:]

    @classmethod
    def of(cls, layer: Layer, B: Tensor, A: Tensor, dtype: torch.dtype, origin: AdapterLayer) -> Self:
        """Return `delta_weight = B A`, computed from another update, as a layer on the CPU.

        Where that was a LoRA its scale is kept, so that `lora_up` keeps its size and no half precision overflows: alpha
        follows the rank, which may be another.

        Args:
            layer: The layer that it belongs to.
            B: `[m, k]`.
            A: `[k, n]`.
            dtype: The dtype to store.
            origin: The update that the factors came from.
        """
        alpha, scale = None, 1.0
        if isinstance(origin, LoraLayer) and origin.is_thin and origin.alpha:
            alpha, scale = origin.alpha * (A.shape[0] / origin.rank), origin.scale
        return cls(layer, (B / scale).to("cpu", dtype), A.to("cpu", dtype), alpha)

    @property
    def rank(self) -> int:
        """The inner size `k`."""
        return self.lora_down.shape[0]

    @property
    def is_thin(self) -> bool:
        """Whether `factors` is all of the update: it is, unless there is a magnitude."""
        return self.dora_scale is None

    def factors(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Return `B [m, k]` (the scale included) and `A [k, n]` in float32 on `device`: `delta_weight = B A`.

        Of a DoRA they are the update of the direction, before the magnitude.
        """
        parts = {name: part.to(device, torch.float32) for name, part in self.parts().items()}
        return self._factors(parts)

    def _factors(self, parts: Parts) -> tuple[Tensor, Tensor]:
        down = parts["lora_down"].reshape(self.rank, -1)
        if "lora_mid" in parts:
            down = torch.einsum("pq...,qj->pj...", parts["lora_mid"], down).reshape(self.rank, -1)
        return parts["lora_up"].reshape(-1, self.rank) * self.scale, down

    def _update(self, parts: Parts, weight: Tensor | None) -> Tensor:
        B, A = self._factors(parts)
        return B @ A

    def shaped(self, shape: Shape | None = None) -> tuple[Tensor, Tensor]:
        """Return `lora_up` and `lora_down` as programs expect them for a weight: 4D for a convolution.

        Args:
            shape: Shape of the weight; None takes that of `layer`.
        """
        shape = shape or self.layer.shape
        up = self.lora_up.reshape(shape[0], self.rank, *[1] * len(shape[2:]))
        inner = shape[1:] if self.lora_mid is None else (shape[1], *[1] * len(shape[2:]))
        return up, self.lora_down.reshape(self.rank, *inner)

    def scaled(self) -> Self:
        """Return the same update with a scale of 1, for programs that read no alpha.

        The power of two in the scale goes into `lora_up`, `lora_down` or both, where that rounds none of their numbers
        (see `times`). If it does everywhere, or the scale is no power of two, a factor becomes float32.
        """
        if self.scale == 1:
            return replace(self, alpha=None)
        exponent = math.frexp(self.scale)[1] - 1
        up, down = self.lora_up, self.lora_down
        for share in (exponent, 0, (exponent + _magnitude(down) - _magnitude(up)) // 2):
            up, down = times(self.lora_up, 2.0**share), times(self.lora_down, 2.0 ** (exponent - share))
            if (up.dtype, down.dtype) == (self.lora_up.dtype, self.lora_down.dtype):
                break
        return replace(self, lora_up=times(up, self.scale / 2.0**exponent), lora_down=down, alpha=None)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is written after `<module>.`, the factors of a convolution in 4D."""
        up, down = self.shaped()
        return AdapterLayer.tensors(replace(self, lora_up=up, lora_down=down))

    @override
    def row_axes(self) -> dict[str, int] | None:
        per_output = self.dora_scale is None or self.dora_scale.shape[0] == self.lora_up.shape[0]
        return {"lora_up": 0, "dora_scale": 0} if per_output else None


def fuse(parts: Sequence[LoraLayer], layer: Layer) -> LoraLayer:
    """Put the updates of the row parts of one weight back together; the inverse of `LoraLayer.cut`.

    Where all parts share `lora_down`, `lora_mid` and the scale, their `lora_up` are stacked. Else `lora_up` becomes
    block diagonal and the rank the sum of theirs: exact too (see `LoraLayer.scaled` for unequal scales).

    Args:
        parts: The updates in the order of their rows. Without magnitude, or all with one per output.
        layer: The fused layer.

    Returns:
        The update of the fused layer.
    """
    whole = stacked(parts, layer)
    if isinstance(whole, LoraLayer):
        return whole
    ups, downs, alpha = _side_by_side(parts)
    scales = [part.dora_scale for part in parts if part.dora_scale is not None]
    return LoraLayer(layer, torch.block_diag(*ups), downs, alpha, dora_scale=torch.cat(scales) if scales else None)


def added(first: LoraLayer, second: LoraLayer) -> LoraLayer:
    """Return the sum of two updates of one layer without magnitudes, exactly: its rank is the sum of theirs."""
    ups, downs, alpha = _side_by_side([first, second])
    return LoraLayer(first.layer, torch.cat(ups, 1), downs, alpha)


def _side_by_side(parts: Sequence[LoraLayer]) -> tuple[list[Tensor], Tensor, float]:
    """Return each `lora_up`, all `lora_down` stacked, and the alpha that goes with that rank."""
    flat = [_without_mid(part) for part in parts]
    scale = flat[0].scale
    if any(part.scale != scale for part in flat):
        flat, scale = [part.scaled() for part in flat], 1.0
    ups = _alike(part.lora_up.reshape(part.lora_up.shape[0], -1) for part in flat)
    downs = torch.cat(_alike(part.lora_down.reshape(part.rank, -1) for part in flat))
    return ups, downs, scale * downs.shape[0]


def _magnitude(tensor: Tensor) -> int:
    """Return the power of two of the largest number."""
    return math.frexp(float(tensor.float().abs().max()))[1]


def _alike(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return tensors in one dtype: theirs, or one that holds the numbers of all."""
    tensors = list(tensors)
    dtypes = {tensor.dtype for tensor in tensors}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    return tensors if len(dtypes) == 1 else [tensor.to(wide) for tensor in tensors]


def _without_mid(part: LoraLayer) -> LoraLayer:
    if part.lora_mid is None:
        return part
    _, down = part.factors()
    return replace(part, lora_down=down.to(part.dtype), lora_mid=None)
