"""Other ways to move an update than the product's, ours, to be measured; none is published for this use.

Each takes the dense update `dW_s [m, n]` of a source layer and returns that of the target layer, `[m', n']`.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lorax import Base
from lorax.compare.matching import Assignment
from lorax.compare.scores import Score
from lorax.linalg import polar
from lorax.models.layers import Layer

from . import MODELS

RANK, RIDGE = MODELS.rank, 1e-2


def soft(dW: Tensor, W_s: Tensor, W_t: Tensor) -> Tensor:
    """Filter by the target's spectrum without a cut: each direction counts `S^2 / (S^2 + S_r^2)`."""
    U, S, Vh = torch.linalg.svd(W_t, full_matrices=False)
    energy = S.square()
    weight = energy / (energy + energy[min(RANK, len(S)) - 1])
    return (U * weight) @ (U.T @ dW @ Vh.T) @ (weight[:, None] * Vh)


def of_share(W: Tensor, share: float) -> int:
    """Return the rank that is a share of the smaller side."""
    return math.ceil(share * min(W.shape))


def of_energy(W: Tensor, share: float) -> int:
    """Return the least rank whose singular values hold a share of `sum S^2`."""
    energy = torch.linalg.svdvals(W).square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1


def blended(dW: Tensor, projected: Tensor, scores: tuple[Score, Score]) -> Tensor:
    """Take the share of the lower corrected similarity from `copy`, the rest from `project`."""
    share = max(0.0, min(1.0, *(score.corrected for score in scores)))
    return share * dW + (1 - share) * projected


def effect_kept(dW: Tensor, W_s: Tensor, W_t: Tensor) -> Tensor:
    """Copy, as strong on the target: `||W^T dW|| / ||W||^2`, the effect on the outputs' own covariance, is kept."""

    def effect(W: Tensor) -> Tensor:
        return (W.T @ dW).norm() / W.square().sum()

    return dW * effect(W_s) / effect(W_t)


def weighted(dW: Tensor, W_s: Tensor, W_t: Tensor) -> Tensor:
    """Map outputs by what the weights make of equal inputs, `W_t W_s^+`, ridge-regularised; inputs stay."""
    gram = W_s @ W_s.T
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    return W_t @ W_s.T @ torch.linalg.solve(gram + ridge, dW)


def rescaled(moved: Tensor, dW: Tensor, W_s: Tensor, W_t: Tensor) -> Tensor:
    """Keep `||dW|| / ||W||`."""
    return moved * (dW.norm() / W_s.norm()) / (moved.norm() / W_t.norm()).clamp_min(1e-12)


Maps = dict[str, tuple[Tensor | None, Tensor | None]]


def streams(source: Base, target: Base, assignment: Assignment) -> Maps:
    """Return for each target attention layer the change of basis of its outputs and inputs, source to target.

    The text is one input that both bases share: keys and values of the cross attention give their inner bases by
    orthogonal Procrustes; queries and outputs carry them to the residual stream, whose one map is estimated from all
    blocks of its module together; the self attention follows from the stream. None is the identity.
    """
    layers = [layer for layer in target.layers.values() if layer.is_attention]
    modules: dict[str, dict[str, dict[str, Layer]]] = {}
    for layer in layers:
        module, _, rest = layer.name.partition(".transformer_blocks.")
        number, _, part = rest.partition(".")
        modules.setdefault(module, {}).setdefault(number, {})[part.removesuffix(".0")] = layer
    maps: Maps = {}
    for blocks in modules.values():
        maps |= _stream(source, target, assignment, blocks)
    return maps


def _stream(source: Base, target: Base, assignment: Assignment, blocks: Mapping[str, Mapping[str, Layer]]) -> Maps:
    def weights(layer: Layer) -> tuple[Tensor, Tensor] | None:
        fed = assignment.source_of(layer.name)
        return (source.weight(fed), target.weight(layer.name)) if fed and fed in source.layers else None

    pairs = {
        (number, part): both
        for number, block in blocks.items()
        for part, layer in block.items()
        if (both := weights(layer)) is not None
    }
    numbers = {number for number, _ in pairs}
    if not numbers:
        return {}

    def product(number: str, part: str, form: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return form(*pairs[number, part])

    inner: dict[tuple[str, str], Tensor] = {}
    total = torch.zeros(())
    for number in numbers:
        for part in ("attn2.to_k", "attn2.to_v"):
            inner[number, part] = polar(product(number, part, lambda s, t: t @ s.T))
        K, V = inner[number, "attn2.to_k"], inner[number, "attn2.to_v"]
        total = total + product(number, "attn2.to_q", lambda s, t, K=K: t.T @ K @ s)
        total = total + product(number, "attn2.to_out", lambda s, t, V=V: t @ V @ s.T)
    Q = polar(total)
    found: Maps = {}
    for number in numbers:
        q, k, v, o = (f"attn1.to_{part}" for part in ("q", "k", "v", "out"))
        inner[number, k] = polar(
            product(number, q, lambda s, t: t @ Q @ s.T) + product(number, k, lambda s, t: t @ Q @ s.T)
        )
        inner[number, v] = polar(
            product(number, v, lambda s, t: t @ Q @ s.T) + product(number, o, lambda s, t: t.T @ Q @ s)
        )
        for attention, text in (("attn1", Q), ("attn2", None)):
            K, V = inner[number, f"{attention}.to_k"], inner[number, f"{attention}.to_v"]
            for part, sides in (("q", (K, Q)), ("k", (K, text)), ("v", (V, text)), ("out", (Q, V))):
                found[blocks[number][f"{attention}.to_{part}"].name] = sides
    return found


def streamed(dW: Tensor, sides: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Change the basis of outputs and inputs."""
    left, right = sides
    moved = dW if left is None else left @ dW
    return moved if right is None else moved @ right.T
