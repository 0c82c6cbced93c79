"""How much the singular subspaces of two bases agree, layer by layer.

`Phi = <G_s, G_t>_F / (||G_s||_F ||G_t||_F)` with `G = W W^T` (left, the outputs) or `W^T W` (right, the inputs): LoRA-X
(arXiv 2501.16559), written with Gram matrices, so that full rank needs no decomposition. Two unrelated layers score
`Phi0 = tr G_s tr G_t / (d ||G_s|| ||G_t||)` and not 0, so the corrected value is `(Phi - Phi0) / (1 - Phi0)`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Base
from .errors import MismatchError, OptionError
from .layers import Layer
from .linalg import decompose
from .progress import Progress, silent

# Above this side a Gram matrix costs more than the product of the two weights (4096^2 float32: 64 MB).
GRAM_LIMIT = 4096
# How much of the source is held at once while the target streams by.
BUDGET_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Score:
    """The similarity of two layers on one side: `phi`, and `chance`, what unrelated layers score. NaN: no value."""

    phi: float
    chance: float

    @property
    def corrected(self) -> float:
        """`(phi - chance) / (1 - chance)`: 0 by chance, 1 for equal subspaces; NaN where chance is already 1."""
        room = 1 - self.chance
        return (self.phi - self.chance) / room if room > 1e-6 else math.nan


NO_SCORE = Score(math.nan, math.nan)


class _Side:
    """One side of one layer: the Gram matrix `G = X X^T` of a factor `X [d, p]`, or the factor where `d` is large."""

    def __init__(self, X: Tensor) -> None:
        self.d = X.shape[0]
        self.trace = float(X.double().square().sum())
        small = X if X.shape[0] <= X.shape[1] else X.T
        gram = small @ small.T
        self.norm = float(torch.linalg.vector_norm(gram.double()))
        self.held = X if self.d > GRAM_LIMIT else gram if small is X else X @ X.T

    def score(self, other: "_Side") -> Score:
        if self.d != other.d or self.norm == 0 or other.norm == 0:
            return NO_SCORE
        scale = self.norm * other.norm
        if self.d > GRAM_LIMIT:
            inner = float(torch.linalg.vector_norm(self.held.T @ other.held)) ** 2
        else:
            inner = float(torch.dot(self.held.flatten(), other.held.flatten()))
        return Score(inner / scale, self.trace * other.trace / (self.d * scale))


def _sides(weight: Tensor, rank: int | None) -> tuple[_Side, _Side]:
    if rank is None:
        return _Side(weight), _Side(weight.T)
    space = decompose(weight, rank)
    return _Side(space.U * space.S), _Side(space.Vh.T * space.S)


def pair_scores(source: Tensor, target: Tensor, rank: int | None = None) -> tuple[Score, Score]:
    """Return the similarity of two weights on the left (output) and on the right (input) side.

    Args:
        source: `[m, n]`, float32.
        target: `[m', n']`, float32, on the same device.
        rank: Compare the weights cut to this many singular triplets; None compares them whole.

    Returns:
        Left and right score; a side has NaN where its sizes differ or a weight is zero.
    """
    (left_s, right_s), (left_t, right_t) = _sides(source, rank), _sides(target, rank)
    return left_s.score(left_t), right_s.score(right_t)


@dataclass(frozen=True, slots=True)
class KindSimilarity:
    """All pairs of one kind of layer: `left[i][j]` is the score of `sources[i]` with `targets[j]`."""

    kind: str
    sources: list[Layer]
    targets: list[Layer]
    left: list[list[Score]]
    right: list[list[Score]]

    def equal_names(self) -> list[tuple[Score, Score]]:
        """Return the left and right score of every source layer with the target layer of the same name."""
        place = {layer.name: j for j, layer in enumerate(self.targets)}
        named = [(i, place[layer.name]) for i, layer in enumerate(self.sources) if layer.name in place]
        return [(self.left[i][j], self.right[i][j]) for i, j in named]


@dataclass(frozen=True, slots=True)
class Similarity:
    """The similarity of two bases: a block of all pairs for each kind of layer.

    Attributes:
        source: Name of the source base.
        target: Name of the target base.
        rank: How many leading triplets were compared; None: whole layers.
        identities: `Base.identity` of both.
        kinds: The scores.
    """

    source: str
    target: str
    rank: int | None
    identities: tuple[str, str]
    kinds: list[KindSimilarity] = field(default_factory=list[KindSimilarity])


def compare_bases(
    source: Base,
    target: Base,
    *,
    rank: int | None = None,
    attention_only: bool = True,
    device: str = "cpu",
    progress: Progress = silent,
) -> Similarity:
    """Compare every source layer with every target layer of the same kind, on both sides where the sizes agree.

    Args:
        source: The base that the adapter was made for.
        target: The base that it shall move to.
        rank: Compare only the leading triplets; None (the default) compares whole layers and decomposes nothing.
        attention_only: Only the attention projections, where LoRA-X adapters live; False takes every layer.
        device: Where to compute, such as `cpu` or `cuda`.
        progress: Called with (done, total, layer name); an exception that it raises stops the work.

    Returns:
        A block of scores for each kind that both bases have.

    Raises:
        OptionError: `rank` is below 1 or above every layer.
        MismatchError: The bases have no kind of layer in common.
        NumericsError: A weight holds NaN or Inf.
    """
    kinds = {
        kind: (s, t)
        for kind, s in _by_kind(source, attention_only).items()
        if (t := _by_kind(target, attention_only).get(kind))
    }
    if not kinds:
        got = f"{source.name} ({source.family.label}) and {target.name} ({target.family.label})"
        raise MismatchError("the two bases share no kind of layer", got, "compare bases of related families")
    check_rank(rank, (layer for s, t in kinds.values() for layer in s + t))
    total, done = sum(len(s) + len(t) for s, t in kinds.values()), 0

    def tick(_: int, __: int, name: str) -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total, name)

    result = Similarity(source.name, target.name, rank, (source.identity(), target.identity()))
    for kind, (sources, targets) in kinds.items():
        scores = score_layers(source, target, sources, targets, rank=rank, device=device, progress=tick)
        left, right = ([[scores[s.name, t.name][side] for t in targets] for s in sources] for side in (0, 1))
        result.kinds.append(KindSimilarity(kind, sources, targets, left, right))
    return result


def score_layers(
    source: Base,
    target: Base,
    sources: list[Layer],
    targets: list[Layer],
    *,
    rank: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[tuple[str, str], tuple[Score, Score]]:
    """Compare every one of some source layers with every one of some target layers, on both sides.

    Args:
        source: The base that `sources` are layers of.
        target: The base that `targets` are layers of.
        sources: Layers of the source.
        targets: Layers of the target.
        rank: Compare only the leading triplets; None compares whole layers.
        device: Where to compute.
        progress: Called for each layer that was read.

    Returns:
        Left and right score by (source layer name, target layer name).
    """
    total, scores = len(sources) + len(targets), dict[tuple[str, str], tuple[Score, Score]]()
    start = 0
    while start < len(sources):
        held: dict[str, tuple[_Side, _Side]] = {}
        while start < len(sources) and sum(side.held.nbytes for pair in held.values() for side in pair) < BUDGET_BYTES:
            layer, start = sources[start], start + 1
            held[layer.name] = _sides(source.weight(layer.name, device), rank)
            progress(start, total, layer.name)
        for j, layer in enumerate(targets, 1):
            left_t, right_t = _sides(target.weight(layer.name, device), rank)
            for name, (left_s, right_s) in held.items():
                scores[name, layer.name] = left_s.score(left_t), right_s.score(right_t)
            progress(start + j, total, layer.name)
    return scores


def highest_rank(layers: Iterable[Layer]) -> int:
    """Return the highest rank that one of `layers` can have: the largest `min(m, n)`."""
    return max((min(layer.matrix_shape) for layer in layers), default=0)


def check_rank(rank: int | None, layers: Iterable[Layer]) -> None:
    """Refuse a rank below 1 or above what every one of `layers` has.

    Raises:
        OptionError: `rank` is out of range.
    """
    most = highest_rank(layers)
    if rank is not None and not 1 <= rank <= most:
        raise OptionError(
            "the rank is out of range", str(rank), f"give a whole number from 1 to {most} for these bases"
        )


def _by_kind(base: Base, attention_only: bool) -> dict[str, list[Layer]]:
    kinds: dict[str, list[Layer]] = {}
    for layer in base.layers.values():
        if layer.is_attention or not attention_only:
            kinds.setdefault(f"{layer.component}:{layer.kind}", []).append(layer)
    return kinds
