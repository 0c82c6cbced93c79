"""LoHa: the element-wise product of two low-rank matrices (FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from .layer import Parts, ScaledLayer, Shape, Shapes, misfit


@dataclass(frozen=True, slots=True, eq=False)
class LohaLayer(ScaledLayer):
    """`delta_weight = alpha / rank * (hada_w1_a @ hada_w1_b) * (hada_w2_a @ hada_w2_b)`, the middle product by element.

    With `hada_t1`, `hada_t2` (the tucker form of a convolution) each matrix product becomes
    `sum_pq hada_t[p, q, y, x] hada_a[p, i] hada_b[q, j]`.

    Attributes:
        hada_w1_a: `[m, k]`; `[k, m]` in the tucker form. So is `hada_w2_a`.
        hada_w1_b: `[k, n]`; `[k, in]` in the tucker form. So is `hada_w2_b`.
        alpha: The numerator of the scale; None means a scale of 1.
        hada_t1: `[k, k, kh, kw]`, or None. So is `hada_t2`.
        dora_scale: The magnitude, `[out, 1, ...]` or `[1, in, ...]`, or None.
    """

    KIND: ClassVar = "loha"
    REQUIRED: ClassVar = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    OPTIONAL: ClassVar = frozenset({"hada_t1", "hada_t2", "dora_scale"})
    INNER: ClassVar = frozenset({"hada_w1_b", "hada_w2_b"})

    hada_w1_a: Tensor
    hada_w1_b: Tensor
    hada_w2_a: Tensor
    hada_w2_b: Tensor
    alpha: float | None = None
    hada_t1: Tensor | None = None
    hada_t2: Tensor | None = None
    dora_scale: Tensor | None = None

    @classmethod
    @override
    def shape_of(cls, shapes: Shapes) -> Shape:
        told = {_product(shapes, number) for number in "12"}
        if len(told) != 1 or None in told:
            raise misfit(cls.KIND, shapes, "which are not two matrices of one size")
        return told.pop() or ()

    @property
    def rank(self) -> int:
        """The inner size `k` of both products; the update itself can have rank `k * k`."""
        return self.hada_w1_b.shape[0]

    def _update(self, parts: Parts, weight: Tensor | None) -> Tensor:
        first, second = (_rebuilt(parts, number) for number in "12")
        return first.mul_(second).mul_(self.scale)  # both are new here

    @override
    def row_axes(self) -> dict[str, int] | None:
        axis = 0 if self.hada_t1 is None else 1
        per_output = self.dora_scale is None or self.dora_scale.shape[0] == self.hada_w1_a.shape[axis]
        return {"hada_w1_a": axis, "hada_w2_a": axis, "dora_scale": 0} if per_output else None


def _product(shapes: Shapes, number: str) -> Shape | None:
    """Return the shape of one of the two products, None if its parts do not fit."""
    a, b, t = shapes[f"hada_w{number}_a"], shapes[f"hada_w{number}_b"], shapes.get(f"hada_t{number}")
    if len(a) != 2 or len(b) != 2:
        return None
    if t is None:
        return (a[0], b[1]) if a[1] == b[0] and not {"hada_t1", "hada_t2"} & shapes.keys() else None
    return (a[1], b[1], *t[2:]) if len(t) > 2 and t[:2] == (a[0], b[0]) else None


def _rebuilt(parts: Parts, number: str) -> Tensor:
    a, b = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]
    return tucker(parts[f"hada_t{number}"], a, b) if f"hada_t{number}" in parts else a @ b


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return `sum_pq core[p, q, ...] a[p, i] b[q, j]`, `[i, j, ...]`."""
    return torch.einsum("pq...,pi,qj->ij...", core, a, b)
