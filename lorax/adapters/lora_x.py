"""LoRA-X: a change of the singular values (arXiv 2501.16559)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import MismatchError
from ..linalg import Subspace, decompose, to_exact
from ..models.base import Base
from .layer import AdapterLayer, Parts, Shape, Shapes, misfit


@dataclass(frozen=True, slots=True, eq=False)
class LoraXLayer(AdapterLayer):
    """The update of one layer as a change of its singular values: `delta_weight = U diag(delta) Vh` (arXiv 2501.16559).

    Attributes:
        delta: `[r]`, one number for each leading singular pair of the source weight.
        fingerprint: `Base.fingerprint` of the weight whose `U` and `Vh` are meant.
    """

    KIND: ClassVar = "lora-x"
    REQUIRED: ClassVar = frozenset({"delta"})
    NEEDS_WEIGHT: ClassVar = True

    delta: Tensor
    fingerprint: str = ""

    @classmethod
    def shape_of(cls, shapes: Shapes) -> Shape:
        """Return an empty shape: `delta` tells nothing of the weight."""
        if len(shapes["delta"]) != 1:
            raise misfit(cls.KIND, shapes, "delta is not a vector of numbers")
        return ()

    @property
    def rank(self) -> int:
        """The number of singular values `r`."""
        return self.delta.numel()

    @property
    def norm_needs_weight(self) -> bool:
        """Whether `norm` depends on the weight of the base: it does not, it is that of `delta`."""
        return False

    def norm(self, weight: Tensor | None = None) -> float:
        """Return `||delta_weight||_F`, which is that of `delta`; no weight is needed."""
        return float(to_exact(self.delta).double().norm())

    def _update(self, parts: Parts, weight: Tensor | None) -> Tensor:
        if weight is None:  # delta_weight has seen to it
            raise MismatchError("a LoRA-X layer needs its source weight", self.layer.name, "give the source base")
        B, A = self.factors_in(decompose(weight.flatten(1), self.rank))
        return (B @ A).to(weight.dtype)

    def check_source(self, source: Base) -> None:
        """Check that `source` holds the very weight that `delta` belongs to.

        Raises:
            MismatchError: It holds another one.
        """
        if source.fingerprint(self.layer.name) != self.fingerprint:
            raise MismatchError(
                "a LoRA-X adapter means nothing without its own source base",
                f"{self.layer.name} differs in {source.name}",
                "give the base that it was made for; if that is the target, swap source and target",
            )

    def factors_in(self, space: Subspace) -> tuple[Tensor, Tensor]:
        """Return `B [m, k]`, `A [k, n]` with `B A = U diag(delta) Vh`; `k` counts the deltas that are not 0 (or is 1).

        Args:
            space: The decomposition of the source weight at this layer's rank.

        Raises:
            MismatchError: `space` has fewer directions than `delta`.
        """
        if space.rank < self.rank:
            got = f"{self.layer.name}: {self.rank} deltas, rank {space.rank}"
            raise MismatchError("the source weight has fewer directions than the adapter", got, "check the source base")
        delta = self.delta.to(space.S.device, torch.float32)
        used = delta.nonzero().flatten() if bool(delta.any()) else torch.zeros(1, dtype=torch.long, device=delta.device)
        root = delta[used].abs().sqrt()
        return space.U[:, used] * (root * delta[used].sign()), root[:, None] * space.Vh[used]
