"""GLoRA: a low-rank update that also depends on the weight (arXiv 2306.07967)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ..errors import MismatchError
from .layer import Parts, ScaledLayer, Shape, Shapes, misfit


@dataclass(frozen=True, slots=True, eq=False)
class GloraLayer(ScaledLayer):
    """`delta_weight = alpha / rank * (W @ a1 @ a2 + b1 @ b2)`, for a convolution with `W a1 a2` over its inputs.

    Files of early LyCORIS hold the same factors the other way round, `W @ a2 @ a1 + b2 @ b1`; the shapes tell which.

    Attributes:
        a1: `[in, k]`, or `[in, k, 1, 1]` for a convolution (early files: `[k, n]`).
        a2: `[k, in]` (early: `[n, k]`).
        b1: `[m, k]` (early: `[k, n]`).
        b2: `[k, n]`, or `[k, in, kh, kw]` (early: `[m, k]`).
        alpha: The numerator of the scale; None means a scale of 1.
        dora_scale: The magnitude, `[out, 1, ...]` or `[1, in, ...]`, or None.
    """

    KIND: ClassVar = "glora"
    KEYS: ClassVar = {name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2")}
    REQUIRED: ClassVar = frozenset({"a1", "a2", "b1", "b2"})
    OPTIONAL: ClassVar = frozenset({"dora_scale"})
    NEEDS_WEIGHT: ClassVar = True

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    alpha: float | None = None
    dora_scale: Tensor | None = None

    @classmethod
    @override
    def shape_of(cls, shapes: Shapes) -> Shape:
        if any(len(shapes[name]) < 2 for name in cls.REQUIRED):
            raise misfit(cls.KIND, shapes, "which are no matrices")
        for a1, a2, b1, b2 in _orders(shapes):
            inner = {a1[1], a2[0], b1[1], b2[0]}
            if len(inner) == 1 and a1[0] == a2[1] in (b2[1], math.prod(b2[1:])) and set(b1[2:]) <= {1}:
                return b1[0], *b2[1:]
        raise misfit(cls.KIND, shapes, "which are not the four factors of one update")

    @property
    def is_early(self) -> bool:
        """Whether the factors are in the order of early LyCORIS."""
        a1, a2, b1, b2 = self.a1, self.a2, self.b1, self.b2
        now = a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]
        early = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
        if now and len(self.layer.shape) > 1:  # both orders are possible: what fits the layer, square ones early
            early = early and self.layer.matrix_shape == (a2.shape[0], a2.shape[0])
        return early and (not now or len(self.layer.shape) > 1)

    @property
    def rank(self) -> int:
        """The inner size `k`."""
        return self.a1.shape[0 if self.is_early else 1]

    def _update(self, parts: Parts, weight: Tensor | None) -> Tensor:
        if weight is None:  # delta_weight has seen to it
            raise MismatchError("a GLoRA update needs the weight", self.layer.name, "give the source base")
        a1, a2, b1, b2 = (parts[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
        if self.is_early:
            return (weight.flatten(1) @ a2 @ a1 + b2 @ b1) * self.scale
        changed = torch.einsum("oi...,ij,jn->on...", weight, a1, a2)
        return (changed + (b1 @ b2).reshape(weight.shape)) * self.scale


def _orders(shapes: Shapes) -> list[tuple[Shape, ...]]:
    a1, a2, b1, b2 = (shapes[name] for name in ("a1", "a2", "b1", "b2"))
    return [(a1, a2, b1, b2), (a2, a1, b2, b1)]
