"""The transfer methods: how an update `B A` of a source layer becomes one of the target layer.

A method is a function here, an entry of `METHODS` and a word in `lorax.options.Method`.
`B [m, k]`, `A [k, n]` are the source's factors, `s` and `t` the leading singular triplets of source and target. Each
method returns factors of the same rank and forms no `[m, n]` product. docs/method.md says when to use which.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from ..linalg import Subspace, back, polar, recompress, to_exact, triplets
from ..options import Method

Factors = tuple[Tensor, Tensor]


class Needs(Enum):
    """What a method is given beside the factors of an update."""

    NOTHING = auto()
    """Nothing: the update itself is the result, whatever its kind."""
    WEIGHTS = auto()
    """The weights of source and target, `[m, n]`."""
    TARGET = auto()
    """The leading singular triplets of the target."""
    BOTH = auto()
    """Those of the source and of the target."""


@dataclass(frozen=True, slots=True)
class TransferMethod:
    """A way to move an update.

    Attributes:
        name: What it is called.
        apply: `(B, A, *what it needs) -> B, A`, on the target.
        needs: What it needs.
        resizes: Whether it moves to a layer of another size.
        only_projects: Whether it needs subspaces, not single singular vectors: those can be had faster.
        leaves_out: Whether it leaves out on purpose what the target does already, so that a lower norm is no loss.
    """

    name: Method
    apply: Callable[..., Factors]
    needs: Needs
    resizes: bool = False
    only_projects: bool = False
    leaves_out: bool = False


def copy(B: Tensor, A: Tensor) -> Factors:
    """Leave the update as it is."""
    return B, A


def project(B: Tensor, A: Tensor, t: Subspace) -> Factors:
    """Project on the target's leading subspaces: `U_t U_t^T (B A) V_t V_t^T` (LoRA-X, arXiv 2501.16559, same size)."""
    return t.U @ (t.U.T @ B), (A @ t.Vh.T) @ t.Vh


def index(B: Tensor, A: Tensor, s: Subspace, t: Subspace) -> Factors:
    """Map a side whose size changes by index, `U_t U_s^T`; project a side that stays (LoRA-X, other size, literal).

    Singular directions are identified by their place in the order, so where only one side changes its size the
    arbitrary signs of the other base's vectors flip parts of the update. Kept for comparison; see `align`.
    """
    r = min(s.rank, t.rank)
    same_left, same_right = _same_sizes(s, t)
    left = t.U @ (t.U.T @ B) if same_left else t.U[:, :r] @ (s.U[:, :r].T @ B)
    right = (A @ t.Vh.T) @ t.Vh if same_right else (A @ s.Vh[:r].T) @ t.Vh[:r]
    return left, right


def align(B: Tensor, A: Tensor, s: Subspace, t: Subspace) -> Factors:
    """Map a side whose size changes by the correspondence that the other side shows; project the side that stays.

    With equal inputs, `R = polar(V_s^T V_t)` (orthogonal Procrustes) and `U_s -> U_t R^T`; the mirror with equal
    outputs. Signs, order and rotations of singular vectors then cancel. Ours; the published rule is `index`, to which
    this falls back where both sides change and nothing is shared.
    """
    same_left, same_right = _same_sizes(s, t)
    if same_left == same_right:
        return index(B, A, s, t)
    r = min(s.rank, t.rank)
    if same_right:
        R = polar(s.Vh[:r] @ t.Vh[:r].T)
        return t.U[:, :r] @ (R.T @ (s.U[:, :r].T @ B)), (A @ t.Vh.T) @ t.Vh
    R = polar(s.U[:, :r].T @ t.U[:, :r])
    return t.U @ (t.U.T @ B), ((A @ s.Vh[:r].T) @ R) @ t.Vh[:r]


def subspace_null(B: Tensor, A: Tensor, s: Subspace, t: Subspace) -> Factors:
    """Move the part in the subspaces and the part in their complements each into its counterpart (ProLoRA, 2506.04244).

    `P_t P_s (B A) Q_s Q_t + (I - P_t)(I - P_s)(B A)(I - Q_s)(I - Q_t)` with `P = U U^T`, `Q = V V^T`, the cross terms
    dropped; of rank `2k`, brought back to `k` by the best approximation.
    """
    B_par, A_par = project(B, A, s)
    B_perp, A_perp = B - B_par, A - A_par
    B_kept, A_kept = project(B_par, A_par, t)
    B_lost, A_lost = project(B_perp, A_perp, t)
    up, down = torch.cat([B_kept, B_perp - B_lost], dim=1), torch.cat([A_kept, A_perp - A_lost])
    return recompress(up, down, B.shape[1])


def orthogonal(B: Tensor, A: Tensor, W_s: Tensor, W_t: Tensor) -> Factors:
    """Leave out what the target does already: the part of the update that goes along the change of the base.

    `dW - max(0, <dW, F> / ||F||^2) F` with `F = (W_t - W_s) A^+ A`, the change of the base for the inputs that the
    update reads, so that the rank stays and `A` too. Ours; docs/results.md measures it.
    """
    U, S, V = triplets(A, A.shape[0])
    F = to_exact((W_t - W_s) @ back(V, A)).double()  # in the basis V
    along = (to_exact(B).double() @ (U * S) * F).sum()
    if not along > 0:
        return B, A
    return B - back(along / F.square().sum() * F @ (U / S).T, B), A


def _same_sizes(s: Subspace, t: Subspace) -> tuple[bool, bool]:
    return s.U.shape[0] == t.U.shape[0], s.Vh.shape[1] == t.Vh.shape[1]


METHODS: dict[str, TransferMethod] = {
    method.name: method
    for method in (
        TransferMethod(Method.copy, copy, Needs.NOTHING),
        TransferMethod(Method.orthogonal, orthogonal, Needs.WEIGHTS, leaves_out=True),
        TransferMethod(Method.project, project, Needs.TARGET, only_projects=True),
        TransferMethod(Method.subspace_null, subspace_null, Needs.BOTH, only_projects=True),
        TransferMethod(Method.align, align, Needs.BOTH, resizes=True),
        TransferMethod(Method.by_index, index, Needs.BOTH, resizes=True),
    )
}
