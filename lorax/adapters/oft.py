"""OFT and BOFT: the outputs of a layer turned by orthogonal matrices (arXiv 2306.07280, arXiv 2311.06243)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import MismatchError
from ..linalg import back, to_exact
from .layer import AdapterLayer, Parts, Shape, Shapes, misfit


@dataclass(frozen=True, slots=True, eq=False)
class OftLayer(AdapterLayer):
    """`delta_weight = rescale * R^T W - W`, `R` block diagonal and orthogonal (LyCORIS "diag-oft").

    `Q = oft_blocks - oft_blocks^T`, `R = (I + Q) (I - Q)^-1` (Cayley). `Q` is first scaled down so that its norm over
    all blocks is no more than the constraint `alpha * out`.

    Attributes:
        oft_blocks: `[blocks, b, b]`, `blocks * b = out`.
        alpha: The constraint, for each output; 0 and None mean none. (ComfyUI takes it for the whole.)
        rescale: `[out, 1, ...]`, a factor for each output, or None. (ComfyUI leaves it out of OFT.)
    """

    KIND: ClassVar = "oft"
    REQUIRED: ClassVar = frozenset({"oft_blocks"})
    OPTIONAL: ClassVar = frozenset({"rescale"})
    NEEDS_WEIGHT: ClassVar = True
    DIMENSIONS: ClassVar[int] = 3

    oft_blocks: Tensor
    alpha: float | None = None
    rescale: Tensor | None = None

    @classmethod
    def shape_of(cls, shapes: Shapes) -> Shape:
        """Return `[out]`: the blocks tell the outputs only."""
        blocks, rescale = shapes["oft_blocks"], shapes.get("rescale")
        if len(blocks) != cls.DIMENSIONS or blocks[-1] != blocks[-2]:
            raise misfit(cls.KIND, shapes, "which are no square blocks")
        out = blocks[-3] * blocks[-1]
        if cls.DIMENSIONS == 4 and (blocks[-1] % 2 or out % (blocks[-1] << (blocks[0] - 1))):
            raise misfit(cls.KIND, shapes, "which are not the blocks of a butterfly")
        if rescale is not None and (rescale[:1] != (out,) or any(size != 1 for size in rescale[1:])):
            raise misfit(cls.KIND, shapes, f"whose rescale is no factor for each of {out} outputs")
        return (out,)

    @property
    def rank(self) -> int:
        """The size `b` of a block."""
        return self.oft_blocks.shape[-1]

    def _update(self, parts: Parts, weight: Tensor | None) -> Tensor:
        if weight is None:  # delta_weight has seen to it
            raise MismatchError("an OFT update needs the weight", self.layer.name, "give the source base")
        outputs = weight.shape[0]
        turned = self._turned(self._rotations(parts["oft_blocks"], outputs), weight.reshape(outputs, -1))
        if "rescale" in parts:
            turned = turned * parts["rescale"].reshape(outputs, 1)
        return turned - weight.reshape(outputs, -1)

    def _turned(self, R: Tensor, weight: Tensor) -> Tensor:
        blocks = weight.reshape(R.shape[0], R.shape[1], -1)
        return (R.mT @ blocks).reshape(weight.shape)

    def _rotations(self, blocks: Tensor, outputs: int) -> Tensor:
        Q = blocks - blocks.mT
        constraint = (self.alpha or 0.0) * outputs
        length = float(Q.norm())
        if 0 < constraint < length:
            Q = Q * (constraint / length)
        Q = to_exact(Q)
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        return back(torch.linalg.solve(eye - Q, eye + Q), blocks)  # the two factors commute

    def _stored_alpha(self) -> float:
        return self.alpha or 0.0  # ComfyUI fails on a BOFT without one


@dataclass(frozen=True, slots=True, eq=False)
class BoftLayer(OftLayer):
    """`delta_weight = rescale * R_s ... R_1 W - W`, `R_i` a butterfly factor: it mixes outputs `2^i * b / 2` apart.

    `Q`, `R` and the constraint are as in OFT.

    Attributes:
        oft_blocks: `[stages, blocks, b, b]`, `blocks * b = out`.
    """

    KIND: ClassVar = "boft"
    DIMENSIONS: ClassVar[int] = 4

    def _turned(self, R: Tensor, weight: Tensor) -> Tensor:
        outputs = weight.shape[0]
        turned = weight
        for stage, rotation in enumerate(R):
            apart = (self.rank // 2) << stage
            mixed = turned.reshape(-1, 2, apart, weight.shape[1]).transpose(1, 2)
            mixed = rotation @ mixed.reshape(rotation.shape[0], self.rank, -1)
            turned = mixed.reshape(-1, apart, 2, weight.shape[1]).transpose(1, 2).reshape(outputs, -1)
        return turned
