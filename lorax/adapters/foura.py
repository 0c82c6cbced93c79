"""FouRA: a LoRA with a gate in the frequencies of its rank axis (arXiv 2406.08798), here with the gate frozen."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ..linalg import back, to_exact
from .layer import Parts, ScaledLayer, Shape, Shapes, misfit


@dataclass(frozen=True, slots=True, eq=False)
class FouraLayer(ScaledLayer):
    """`delta_weight = alpha / rank * foura_up @ C @ foura_down`, `C = Re(F^H diag(foura_gate) F)`.

    `F` is the unitary discrete Fourier transform on the rank axis, so `C [k, k]` is a real circulant:
    `C[a, b] = c[(a - b) mod k]`, `c = Re(ifft(foura_gate))`. There is no common file format for FouRA; this one is
    ours: `<module>.foura_up.weight`, `<module>.foura_down.weight`, `<module>.foura_gate`, `<module>.alpha`.

    Attributes:
        foura_up: `[m, k]`.
        foura_down: `[k, n]`.
        foura_gate: `[k]`, real, one number for each frequency; all 1 makes it a LoRA.
        alpha: The numerator of the scale; None means a scale of 1.
    """

    KIND: ClassVar = "foura"
    KEYS: ClassVar = {"foura_up": "foura_up.weight", "foura_down": "foura_down.weight"}
    REQUIRED: ClassVar = frozenset({"foura_up", "foura_down", "foura_gate"})
    INNER: ClassVar = frozenset({"foura_down"})

    foura_up: Tensor
    foura_down: Tensor
    foura_gate: Tensor
    alpha: float | None = None

    @classmethod
    @override
    def shape_of(cls, shapes: Shapes) -> Shape:
        up, down, gate = shapes["foura_up"], shapes["foura_down"], shapes["foura_gate"]
        if len(up) < 2 or len(down) < 2 or up[1] != down[0] or any(size != 1 for size in up[2:]):
            raise misfit(cls.KIND, shapes, "which are not two factors of one update")
        if gate != (down[0],):
            raise misfit(cls.KIND, shapes, f"whose gate has not the length of the rank, {down[0]}")
        return up[0], *down[1:]

    @property
    def rank(self) -> int:
        """The inner size `k`."""
        return self.foura_down.shape[0]

    @property
    @override
    def is_thin(self) -> bool:
        return True

    def factors(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Return `B`, the circulant included, and `A` in float32 on `device`."""
        return self._factors({name: part.to(device, torch.float32) for name, part in self.parts().items()})

    def _factors(self, parts: Parts) -> tuple[Tensor, Tensor]:
        # A circulant acts on rows as a filter does on signals: in the frequencies, without being formed.
        gated = torch.fft.fft(to_exact(parts["foura_up"]).reshape(-1, self.rank), dim=1)
        up = torch.fft.ifft(gated * _symmetric(to_exact(parts["foura_gate"])), dim=1).real
        return back(up * self.scale, parts["foura_up"]), parts["foura_down"].reshape(self.rank, -1)

    def _update(self, parts: Parts, weight: Tensor | None) -> Tensor:
        B, A = self._factors(parts)
        return B @ A

    @override
    def row_axes(self) -> dict[str, int]:
        return {"foura_up": 0}


def _symmetric(gate: Tensor) -> Tensor:
    """Return the even part of a gate, `(g[j] + g[-j]) / 2`: all that the real part of the circulant keeps of it."""
    return (gate + gate.roll(-1).flip(0)) / 2
