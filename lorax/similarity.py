"""How much the singular subspaces of two bases agree, layer by layer.

`Phi = <G_s, G_t>_F / (||G_s||_F ||G_t||_F)` with `G = W W^T` (left, the outputs) or `W^T W` (right, the inputs): LoRA-X
(arXiv 2501.16559), written with Gram matrices, so that full rank needs no decomposition. Two unrelated layers score
`Phi0 = tr G_s tr G_t / (d ||G_s|| ||G_t||)` and not 0, so the corrected value is `(Phi - Phi0) / (1 - Phi0)`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Base
from .errors import MismatchError, OptionError
from .layers import Layer
from .linalg import decompose, gram
from .progress import Progress, counter, silent

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


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of one layer: `d` numbers wide; `held` is its Gram matrix `[d, d]`, or where `d` is large its factor."""

    d: int
    trace: float
    norm: float
    held: Tensor


def _sides(weight: Tensor, rank: int | None) -> tuple[_Side, _Side]:
    """Return the left (output) and the right (input) side: `W W^T` and `W^T W` have one trace and one norm."""
    if rank is not None:
        space = decompose(weight, rank)
        energy = space.S.double().square()
        trace, norm = float(energy.sum()), float(energy.norm())
        left, right = (_held(space.U * space.S), _held(space.Vh.T * space.S))
    else:
        wide = weight.shape[0] <= weight.shape[1]
        G = gram(weight if wide else weight.T)
        trace, norm = float(G.diagonal().double().sum()), float(torch.linalg.vector_norm(G.double()))
        left = G if wide and G.shape[0] <= GRAM_LIMIT else _held(weight)
        right = G if not wide and G.shape[0] <= GRAM_LIMIT else _held(weight.T)
    return _Side(weight.shape[0], trace, norm, left), _Side(weight.shape[1], trace, norm, right)


def _held(X: Tensor) -> Tensor:
    return gram(X) if X.shape[0] <= GRAM_LIMIT else X


def _scores(sources: list[_Side], targets: list[_Side]) -> list[list[Score]]:
    """Compare every source with every target; the inner products of all Gram matrices are one matrix product."""
    table = [[NO_SCORE] * len(targets) for _ in sources]
    for d in {side.d for side in sources} & {side.d for side in targets}:
        rows, columns = ([i for i, side in enumerate(sides) if side.d == d] for sides in (sources, targets))
        if d > GRAM_LIMIT:
            inner = [
                [float(torch.linalg.vector_norm(sources[i].held.T @ targets[j].held)) ** 2 for j in columns]
                for i in rows
            ]
        else:
            left, right = (
                torch.stack([side.held.flatten() for side in sides])
                for sides in ([sources[i] for i in rows], [targets[j] for j in columns])
            )
            inner = (left @ right.T).tolist()
        for i, line in zip(rows, inner, strict=True):
            for j, value in zip(columns, line, strict=True):
                s, t = sources[i], targets[j]
                if scale := s.norm * t.norm:
                    table[i][j] = Score(value / scale, s.trace * t.trace / (d * scale))
    return table


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
    return _scores([left_s], [left_t])[0][0], _scores([right_s], [right_t])[0][0]


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
    tick = counter(progress, sum(len(s) + len(t) for s, t in kinds.values()))
    result = Similarity(source.name, target.name, rank, (source.identity(), target.identity()))
    for kind, (sources, targets) in kinds.items():
        scores = score_layers(source, target, sources, targets, rank=rank, device=device, tick=tick)
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
    tick: Callable[[str], None],
) -> dict[tuple[str, str], tuple[Score, Score]]:
    """Compare every one of some source layers with every one of some target layers, on both sides.

    Args:
        source: The base that `sources` are layers of.
        target: The base that `targets` are layers of.
        sources: Layers of the source.
        targets: Layers of the target.
        rank: Compare only the leading triplets; None compares whole layers.
        device: Where to compute.
        tick: Called with the name of each layer that was read.

    Returns:
        Left and right score by (source layer name, target layer name).
    """
    scores: dict[tuple[str, str], tuple[Score, Score]] = {}

    def hold(base: Base, layers: Iterator[Layer], budget: int) -> dict[str, tuple[_Side, _Side]]:
        """Take layers until what is held of them fills the budget."""
        held: dict[str, tuple[_Side, _Side]] = {}
        size = 0
        while (size < budget or not held) and (layer := next(layers, None)) is not None:
            held[layer.name] = _sides(base.weight(layer.name, device), rank)
            size += sum(side.held.nbytes for side in held[layer.name])
            tick(layer.name)
        return held

    waiting = iter(sources)
    while held_s := hold(source, waiting, BUDGET_BYTES):
        streamed = iter(targets)
        while held_t := hold(target, streamed, BUDGET_BYTES // 4):
            sides = [_scores([s[k] for s in held_s.values()], [t[k] for t in held_t.values()]) for k in (0, 1)]
            for i, name_s in enumerate(held_s):
                for j, name_t in enumerate(held_t):
                    scores[name_s, name_t] = sides[0][i][j], sides[1][i][j]
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
