"""The linear algebra: singular subspaces, maps between them, and products of two thin factors.

Letters as in the method: a weight `W` is `[m, n]`; `U [m, r]`, `S [r]`, `Vh [r, n]` are its `r` leading singular
triplets. A low-rank update is a pair of factors `B [m, k]`, `A [k, n]` and stays one: no `[m, n]` product is formed.
Everything is deterministic. Products are made in float32 on the device of the tensors; what needs float64 or a
decomposition is done there too, or on the CPU where the device has none of them (`is_exact`).
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .checks import check_positive

# Singular values below this share of the first are noise: a Gram matrix in float64 carries them squared, with an error
# of eps = 2.2e-16, so it resolves down to about sqrt(eps * size) = 5e-7.
RESOLUTION = 1e-6
# Rows of a Gram matrix that are computed at a time: few enough to leave out most of the mirrored half, enough for fast
# products (160 to 320 measure alike on a CPU).
GRAM_ROWS = 256
# Directions beyond the rank that a single-precision basis takes along, so that its rounding stays out of the rank.
SPARE = 64
# A float32 Gram matrix carries squared singular values with an error of about 1e-6 of the largest: directions whose
# singular value is below this share of the first are found in float64.
SINGLE_RESOLUTION = 0.03
# Numbers from 2^-24 to 2^24 have fourth powers far inside float32, which goes from 2^-126 to 2^127.
SQUARED = 24


@dataclass(frozen=True, slots=True)
class Subspace:
    """The leading singular triplets of a weight: `U [m, r]`, `S [r]` (falling), `Vh [r, n]`, all float32."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def rank(self) -> int:
        """The number of triplets `r`."""
        return self.S.numel()

    def singular_change(self, B: Tensor, A: Tensor) -> Tensor:
        """Return `delta [r]`, `delta_i = u_i^T (B A) v_i`: of all `U diag(delta) Vh` the one closest to `B A`."""
        return ((self.U.T @ B) * (A @ self.Vh.T).T).sum(1)


@cache
def is_exact(device: torch.device) -> bool:
    """Return whether a device computes in float64 and decomposes, which is tried once.

    Apple's MPS, Intel's Arc GPUs and DirectML have no float64; MPS lacks some of the decompositions too.
    """
    try:
        matrix = torch.eye(2, dtype=torch.float64, device=device)
        for decomposition in (torch.linalg.eigh, torch.linalg.qr, torch.linalg.svd):
            decomposition(matrix @ matrix)
        torch.linalg.solve(matrix, matrix)
    except torch.cuda.OutOfMemoryError:  # that tells nothing of what the device can do
        raise
    except (RuntimeError, TypeError):
        return False
    return True


def to_exact(tensor: Tensor) -> Tensor:
    """Return a tensor where it can be made float64 and decomposed: on its own device, or on the CPU.

    Not made float64 on the way: MPS refuses that.
    """
    return tensor if is_exact(tensor.device) else tensor.cpu()


def back(result: Tensor, like: Tensor) -> Tensor:
    """Return what was computed of `to_exact` in the dtype and on the device of `like`."""
    return result.to(like.dtype).to(like.device)


def single(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Return a tensor of any floating dtype as float32 on a device.

    It is moved as it is stored, which is fewer bytes, where the device knows every dtype.
    """
    device = torch.device(device)
    return (tensor.to(device) if is_exact(device) else tensor.float().to(device)).float()


def decompose(weight: Tensor, rank: int) -> Subspace:
    """Compute the leading singular triplets, exactly, through the smaller Gram matrix in float64.

    `W W^T = U S^2 U^T`, `Vh = S^-1 U^T W` (the mirror for `m > n`). The sign of a pair is fixed: the entry of `u_i`
    that is largest in size is positive.

    Args:
        weight: `[m, n]`, any floating dtype, finite.
        rank: The most triplets wanted. Fewer come back where the weight has fewer: `min(m, n)`, or its numerical rank,
            `#{S > S[0] * RESOLUTION}`.

    Returns:
        The triplets in float32 on the device of `weight`.

    Raises:
        OptionError: `rank` is below 1.
    """
    check_positive(rank)
    U, S, V = triplets(weight, rank)
    signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return _subspace(U * signs, S, (V * signs).T, weight.device)


def triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `U [m, r]`, `S [r]`, `V [n, r]` of `decompose` in float64, before the signs are fixed, as `to_exact`."""
    wide = matrix.shape[0] <= matrix.shape[1]
    matrix = to_exact(matrix if wide else matrix.T).double()
    energy, vectors = torch.linalg.eigh(gram(matrix))
    S, near = energy.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    keep = min(rank, int((S[0] * RESOLUTION < S).sum()))
    S, near = S[:keep], near[:, :keep]
    far = (matrix.T @ near) / S
    U, V = (near, far) if wide else (far, near)
    return U, S, V


def leading_subspace(weight: Tensor, rank: int) -> Subspace:
    """Compute the leading subspaces about twice as fast as `decompose`, for what needs only the projectors on them.

    A basis of `rank + SPARE` directions from `eigh` of the Gram matrix in float32, then the Ritz values and vectors of
    the weight in it, from a small Gram matrix in float64. Measured on 1280 x 1280 weights at rank 320, the directions
    leave the exact subspace by 5e-6 (mean) and a projected update differs by 2e-5 to 9e-5; with a float32 SVD it is
    2e-6 and 1e-5. A spectrum that falls too far for float32 goes to `decompose`.

    Args:
        weight: `[m, n]`, float32, finite.
        rank: As in `decompose`.

    Returns:
        As in `decompose`, where single vectors in a cluster of singular values may be turned among each other.

    Raises:
        OptionError: `rank` is below 1.
    """
    size = min(weight.shape)
    if rank < 1 or rank + SPARE >= size:
        return decompose(weight, rank)
    wide = weight.shape[0] <= weight.shape[1]
    matrix = weight if wide else weight.T
    energy, vectors = torch.linalg.eigh(to_exact(gram(near_one(matrix))))
    if float(energy[-rank]) < SINGLE_RESOLUTION**2 * float(energy[-1]):
        return decompose(weight, rank)
    basis = back(vectors[:, -rank - SPARE :], matrix)
    image = matrix.T @ basis
    energy, turn = torch.linalg.eigh(gram(to_exact(image.T).double()))
    S, turn = back(energy[-rank:].sqrt().flip(0), matrix), back(turn[:, -rank:].flip(1), matrix)
    near, far = basis @ turn, (image @ turn) / S
    U, V = (near, far) if wide else (far, near)
    return _subspace(U, S, V.T, weight.device)


def _subspace(U: Tensor, S: Tensor, Vh: Tensor, device: torch.device) -> Subspace:
    """Lay the numbers out in one way: products round by the layout, and the cache keeps only the numbers."""
    U, S, Vh = (part.float().contiguous().to(device) for part in (U, S, Vh))
    return Subspace(U, S, Vh)


def gram(X: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `X X^T`, `[d, d]` for `X [d, p]`, exactly symmetric, without computing most of its mirrored half.

    Args:
        X: The factor.
        out: Where to write it, `[d, d]`; None makes a new tensor.
    """
    d = X.shape[0]
    G = X.new_empty(d, d) if out is None else out
    for i in range(0, d, GRAM_ROWS):
        end = min(i + GRAM_ROWS, d)
        G[i:, i:end] = X[i:] @ X[i:end].T
        G[i:end, end:] = G[end:, i:end].T
    return G


def near_one(tensor: Tensor) -> Tensor:
    """Return a tensor times a power of two so that float32 holds squares of its numbers and sums of those.

    No bit of a number changes, so that what does not depend on the scale stays the same to the last bit.
    """
    exponent = math.frexp(max(-float(tensor.amin()), float(tensor.amax())))[1]  # the norm of torch is slower
    if abs(exponent) <= SQUARED:
        return tensor
    return tensor * 2.0 ** min(max(-exponent, -126), 126)  # the power itself is a float32


def all_finite(tensor: Tensor) -> bool:
    """Return whether every number is finite as float32.

    NaN and Inf stay in a sum, which is quicker than a look at each number; a sum of finite numbers can be too large.
    """
    tensor = tensor.float()
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def polar(matrix: Tensor) -> Tensor:
    """Return the polar factor, the solution of `argmin_R ||X R - Y||_F` for `X^T Y`: orthonormal rows or columns."""
    U, _, Vh = torch.linalg.svd(to_exact(matrix).double(), full_matrices=False)
    return back(U @ Vh, matrix)


def norm(B: Tensor, A: Tensor) -> float:
    """Return `||B A||_F` from the `[k, k]` Gram matrices: `||B A||^2 = <B^T B, A A^T>`, in float64.

    Where `k` is larger than a side of the product, from the product, which is then smaller than those.
    """
    B, A = to_exact(B).double(), to_exact(A).double()
    if B.shape[1] > min(B.shape[0], A.shape[1]):
        return float((B @ A).norm())
    return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())


def refactor(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best factors of at most a given rank for a dense update (Eckart-Young).

    Args:
        update: `[m, n]`, float32.
        rank: Fewer where the update has fewer; at least 1.

    Returns:
        `B [m, k]`, `A [k, n]`, the singular values shared evenly by both.
    """
    space = decompose(update, rank)
    if not space.rank:
        return update[:, :1] * 0, update[:1] * 0
    root = space.S.sqrt()
    return space.U * root, root[:, None] * space.Vh


def recompress(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best factors of a given rank for `B A`, by two thin QR and a small SVD (Eckart-Young).

    Args:
        B: `[m, k]`.
        A: `[k, n]`.
        rank: The rank of the result, at most `k`.

    Returns:
        `B' [m, rank]`, `A' [rank, n]` in the dtype of the input, the singular values shared evenly by both.
    """
    if 2 * B.shape[1] > min(B.shape[0], A.shape[1]):
        return refactor(B @ A, rank)
    left, R = torch.linalg.qr(to_exact(B).double())
    right, L = torch.linalg.qr(to_exact(A).double().T)
    U, S, Vh = torch.linalg.svd(R @ L.T, full_matrices=False)
    root = S[:rank].sqrt()
    return back((left @ U[:, :rank]) * root, B), back(root[:, None] * (Vh[:rank] @ right.T), A)
