"""LoKr: the Kronecker product of two small matrices (KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from .layer import Parts, ScaledLayer, Shape, Shapes, misfit
from .loha import tucker


@dataclass(frozen=True, slots=True, eq=False)
class LokrLayer(ScaledLayer):
    """`delta_weight = scale * kron(w1, w2)`.

    `w1 [a, c]` is `lokr_w1` or `lokr_w1_a @ lokr_w1_b`; `w2 [b, d]` or `[b, d, kh, kw]` is `lokr_w2`, or
    `lokr_w2_a @ lokr_w2_b`, or with `lokr_t2` the sum `sum_pq lokr_t2[p, q, y, x] lokr_w2_a[p, i] lokr_w2_b[q, j]`.
    The scale is `alpha / rank`, with the rank of `w2` or else of `w1`, and 1 where both are whole.

    Attributes:
        alpha: The numerator of the scale; None means a scale of 1.
        lokr_w1: `[a, c]`, or None. Instead of it `lokr_w1_a [a, k]` and `lokr_w1_b [k, c]`.
        lokr_w2: `[b, d]` or `[b, d, kh, kw]`, or None. Instead of it `lokr_w2_a [b, k]` and `lokr_w2_b [k, d*kh*kw]`;
            with `lokr_t2 [k, k, kh, kw]` they are `[k, b]` and `[k, d]`.
        dora_scale: The magnitude, `[out, 1, ...]` or `[1, in, ...]`, or None.
    """

    KIND: ClassVar = "lokr"
    REQUIRED: ClassVar[frozenset[str]] = frozenset()
    OPTIONAL: ClassVar = frozenset(
        {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale"}
    )
    INNER: ClassVar = frozenset({"lokr_w1_b", "lokr_w2_b"})

    alpha: float | None = None
    lokr_w1: Tensor | None = None
    lokr_w1_a: Tensor | None = None
    lokr_w1_b: Tensor | None = None
    lokr_w2: Tensor | None = None
    lokr_w2_a: Tensor | None = None
    lokr_w2_b: Tensor | None = None
    lokr_t2: Tensor | None = None
    dora_scale: Tensor | None = None

    @classmethod
    @override
    def shape_of(cls, shapes: Shapes) -> Shape:
        w1, w2 = _factor(shapes, "lokr_w1", None), _factor(shapes, "lokr_w2", shapes.get("lokr_t2"))
        if w1 is None or w2 is None or len(w1) != 2:
            raise misfit(cls.KIND, shapes, "which are not two factors of a Kronecker product")
        return w1[0] * w2[0], w1[1] * w2[1], *w2[2:]

    @property
    def rank(self) -> int:
        """The inner size `k`; where both factors are whole, the highest rank that the update can have."""
        decomposed = self.lokr_w2_b if self.lokr_w2_b is not None else self.lokr_w1_b
        if decomposed is not None:
            return decomposed.shape[0]
        w1, w2 = _factors(self.parts())
        return min(w1.shape) * min(w2.flatten(1).shape)

    @property
    def scale(self) -> float:
        """`alpha / rank`; 1 where both factors are whole."""
        whole = self.lokr_w1 is not None and self.lokr_w2 is not None
        return 1.0 if self.alpha is None or whole else self.alpha / self.rank

    def _update(self, parts: Parts, weight: Tensor | None) -> Tensor:
        w1, w2 = _factors(parts)
        w1 = w1.reshape(w1.shape[0], 1, w1.shape[1], 1, *[1] * (w2.dim() - 2))
        # By hand: torch.kron of torch 2.4 refuses some strides.
        return (w1 * w2[:, None]).flatten(2, 3).flatten(0, 1) * self.scale


def _factor(shapes: Shapes, name: str, core: Shape | None) -> Shape | None:
    """Return the shape of one factor of the Kronecker product, None if its parts do not fit."""
    whole, a, b = (shapes.get(name + tail) for tail in ("", "_a", "_b"))
    if whole is not None:
        return whole if len(whole) >= 2 and a is None and b is None and core is None else None
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return None
    if core is None:
        return (a[0], b[1]) if a[1] == b[0] else None
    return (a[1], b[1], *core[2:]) if len(core) > 2 and core[:2] == (a[0], b[0]) else None


def _factors(parts: Parts) -> tuple[Tensor, Tensor]:
    w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        return w1, parts["lokr_w2"]
    a, b = parts["lokr_w2_a"], parts["lokr_w2_b"]
    return w1, tucker(parts["lokr_t2"], a, b) if "lokr_t2" in parts else a @ b
