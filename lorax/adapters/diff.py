"""Differences stored as they are: of a whole weight, and of one-dimensional parameters (biases and norms)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from .layer import AdapterLayer, Parts, Shape, Shapes, misfit


@dataclass(frozen=True, slots=True, eq=False)
class DiffLayer(AdapterLayer):
    """`delta_weight = diff` (LyCORIS "full").

    Attributes:
        diff: In the shape of the weight.
    """

    KIND: ClassVar = "diff"
    REQUIRED: ClassVar = frozenset({"diff"})

    diff: Tensor

    @classmethod
    @override
    def shape_of(cls, shapes: Shapes) -> Shape:
        if len(shapes["diff"]) < 2:
            raise misfit(cls.KIND, shapes, "which is no weight")
        return shapes["diff"]

    @property
    def rank(self) -> int:
        """The highest rank that the update can have."""
        return min(self.diff.flatten(1).shape)

    def _update(self, parts: Parts, weight: Tensor | None) -> Tensor:
        return parts["diff"]

    def tensors(self) -> dict[str, Tensor]:
        """Return `diff` in the shape of the weight, without which ComfyUI leaves it out."""
        return {"diff": self.diff.reshape(self.layer.shape or self.diff.shape)}

    @override
    def row_axes(self) -> dict[str, int]:
        return {"diff": 0}


@dataclass(frozen=True, slots=True, eq=False)
class VectorLayer(AdapterLayer):
    """The difference of a one-dimensional parameter: a bias, or the weight or bias of a norm.

    Its layer is the parameter, such as `unet.conv_in.bias`, of shape `[m]`; `delta_weight` is `[m, 1]`.

    Attributes:
        diff: `[m]`.
        role: How files call it: `diff` (a weight), `diff_b`, `w_norm`, `b_norm`.
    """

    KIND: ClassVar = "vector"
    REQUIRED: ClassVar = frozenset({"diff"})

    diff: Tensor
    role: str = "diff"

    @classmethod
    @override
    def shape_of(cls, shapes: Shapes) -> Shape:
        if len(shapes["diff"]) != 1:
            raise misfit(cls.KIND, shapes, "which is no vector")
        return shapes["diff"]

    @property
    def rank(self) -> int:
        """A vector has rank 1."""
        return 1

    def _update(self, parts: Parts, weight: Tensor | None) -> Tensor:
        return parts["diff"]

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {self.role: self.diff}

    @override
    def row_axes(self) -> dict[str, int]:
        return {"diff": 0}
