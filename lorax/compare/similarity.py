"""How much the singular subspaces of two bases agree, layer by layer.

`Phi = <G_s, G_t>_F / (||G_s||_F ||G_t||_F)` with `G = W W^T` (left, the outputs) or `W^T W` (right, the inputs): LoRA-X
(arXiv 2501.16559), written with Gram matrices, so that full rank needs no decomposition. Two unrelated layers score
`Phi0 = tr G_s tr G_t / (d ||G_s|| ||G_t||)` and not 0, so the corrected value is `(Phi - Phi0) / (1 - Phi0)`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..checks import check_rank
from ..compute.engine import CPU, Engine
from ..errors import MismatchError
from ..linalg import Subspace, decompose, gram, near_one, to_exact
from ..models.base import Base
from ..models.layers import Layer
from ..progress import Progress, counter, silent, unheard
from .scores import Array, Score, Scores, ScoreTable, Sides, check_pairs

# Above this side a Gram matrix costs more than the product of the two weights (4096^2 float32: 64 MB).
GRAM_LIMIT = 4096
# How much of the source is held at once while the target streams by.
BUDGET_BYTES = 2**30
# Sources whose scores are computed at a time.
ROWS = 256


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of one layer, `d` wide; `held` is its Gram matrix `[d, d]`, or where `d` is large its factor."""

    trace: float
    norm: float
    held: Tensor


class _Group:
    """One side of some layers; the Gram matrices of one width lie in one tensor `[layers, d, d]`, where they are made.

    Args:
        sizes: The width of each layer.
        device: Where to compute.
    """

    def __init__(self, sizes: list[int], device: str | torch.device) -> None:
        self.sides: list[_Side] = []
        self.places: dict[int, list[int]] = {}
        self.of: list[int] = []
        for i, d in enumerate(sizes):
            self.of.append(len(self.places.setdefault(d, [])))
            self.places[d].append(i)
        self.stacks = {
            d: torch.empty(len(found), d, d, device=device) for d, found in self.places.items() if d <= GRAM_LIMIT
        }

    def held(self, X: Tensor) -> Tensor:
        """Return `X X^T` for the next layer in its place; `X` itself where it is too wide for that."""
        i, d = len(self.sides), X.shape[0]
        return gram(X, self.stacks[d][self.of[i]]) if d in self.stacks else X


Groups = tuple[_Group, _Group]


def _groups(shapes: list[tuple[int, int]], device: str | torch.device) -> Groups:
    """Return empty groups for the left (output) and the right (input) side of some layers."""
    return _Group([m for m, _ in shapes], device), _Group([n for _, n in shapes], device)


def _add(groups: Groups, layer: Tensor | Subspace) -> None:
    """Add the next layer: a weight, or one that is cut to its leading triplets. Both sides have one trace and norm."""
    if isinstance(layer, Subspace):
        layer = Subspace(layer.U, near_one(layer.S), layer.Vh)
        factors = layer.U * layer.S, layer.Vh.T * layer.S
    else:
        layer = near_one(layer)
        factors = layer, layer.T
    held = [group.held(X) for group, X in zip(groups, factors, strict=True)]
    if isinstance(layer, Subspace):
        energy = to_exact(layer.S).double().square()
        trace, norm = float(energy.sum()), float(energy.norm())
    else:
        X, G = min(zip(factors, held, strict=True), key=lambda pair: pair[0].shape[0])
        G = to_exact(gram(X) if G is X else G)
        trace, norm = float(G.diagonal().double().sum()), float(torch.linalg.vector_norm(G.double()))
    for group, of in zip(groups, held, strict=True):
        group.sides.append(_Side(trace, norm, of))


def _scores(sources: _Group, targets: _Group, out: Array) -> None:
    """Compare every source with every target; the inner products of all Gram matrices are one matrix product.

    Args:
        sources: One side of the sources.
        targets: The same side of the targets.
        out: Where to write phi and chance, `[sources, targets, 2]`, all NaN.
    """
    for d in sources.places.keys() & targets.places.keys():
        rows, columns = sources.places[d], targets.places[d]
        if d > GRAM_LIMIT:
            products = [
                [float(torch.linalg.vector_norm(sources.sides[i].held.T @ targets.sides[j].held)) ** 2 for j in columns]
                for i in rows
            ]
            inner = np.array(products)
        else:
            inner = (sources.stacks[d].flatten(1) @ targets.stacks[d].flatten(1).T).cpu().numpy()
        norms, traces = ([getattr(targets.sides[j], value) for j in columns] for value in ("norm", "trace"))
        for start in range(0, len(rows), ROWS):
            some = [sources.sides[i] for i in rows[start : start + ROWS]]
            scale = np.outer([side.norm for side in some], norms)
            with np.errstate(divide="ignore", invalid="ignore"):
                phi = inner[start : start + ROWS].astype(np.float64) / scale
                chance = np.outer([side.trace for side in some], traces) / (d * scale)
            found = np.where((scale > 0)[..., None], np.stack([phi, chance], axis=-1), np.nan)
            out[np.ix_(rows[start : start + ROWS], columns)] = found


def pair_scores(source: Tensor, target: Tensor, rank: int | None = None) -> tuple[Score, Score]:
    """Return the similarity of two weights on the left (output) and on the right (input) side.

    Args:
        source: `[m, n]`, float32.
        target: `[m', n']`, float32, on the same device.
        rank: Compare the weights cut to this many singular triplets; None compares them whole.

    Returns:
        Left and right score; a side has NaN where its sizes differ or a weight is zero.
    """
    groups: list[Groups] = []
    for weight in (source, target):
        groups.append(_groups([(weight.shape[0], weight.shape[1])], weight.device))
        _add(groups[-1], weight if rank is None else decompose(weight, rank))
    values = np.full((1, 1, 4), np.nan)
    for side, (s, t) in enumerate(zip(*groups, strict=True)):
        _scores(s, t, values[..., 2 * side : 2 * side + 2])
    left, right = _sides(values)
    return left[0, 0], right[0, 0]


def _sides(values: Array) -> Sides:
    """Return the tables of the left and of the right side, of `[sources, targets, 4]`: phi and chance of each."""
    left, right = (ScoreTable(values[..., place], values[..., place + 1]) for place in (0, 2))
    return left, right


@dataclass(frozen=True, slots=True)
class KindSimilarity:
    """All pairs of one kind of layer: `left[i, j]` is the score of `sources[i]` with `targets[j]`."""

    kind: str
    sources: list[Layer]
    targets: list[Layer]
    left: ScoreTable
    right: ScoreTable

    def equal_names(self) -> list[tuple[Score, Score]]:
        """Return the left and right score of every source layer with the target layer of the same name."""
        place = {layer.name: j for j, layer in enumerate(self.targets)}
        named = [(i, place[layer.name]) for i, layer in enumerate(self.sources) if layer.name in place]
        return [(self.left[i, j], self.right[i, j]) for i, j in named]


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

    @property
    def scores(self) -> Scores:
        """Left and right score of every pair, by (source layer name, target layer name)."""
        scores = Scores()
        for kind in self.kinds:
            scores.add(kind.sources, kind.targets, (kind.left, kind.right))
        return scores


def compare_bases(
    source: Base,
    target: Base,
    *,
    rank: int | None = None,
    attention_only: bool = True,
    engine: Engine = CPU,
    progress: Progress = silent,
) -> Similarity:
    """Compare every source layer with every target layer of the same kind, on both sides where the sizes agree.

    Args:
        source: The base that the adapter was made for.
        target: The base that it shall move to.
        rank: Compare only the leading triplets; None (the default) compares whole layers and decomposes nothing.
        attention_only: Only the attention projections, where LoRA-X adapters live; False takes every layer.
        engine: How and where to compute.
        progress: Called with (done, total, layer name); an exception that it raises stops the work.

    Returns:
        A block of scores for each kind that both bases have.

    Raises:
        OptionError: `rank` is below 1 or above every layer.
        MismatchError: The bases have no kind of layer in common, or too many of one kind.
        NumericsError: A weight holds NaN or Inf.
    """
    kinds = shared_kinds(source, target, attention_only=attention_only)
    check_rank(rank, (layer for s, t in kinds.values() for layer in s + t))
    tick = counter(progress, sum(len(s) + len(t) for s, t in kinds.values()))
    with engine.remembering(source, target):
        result = Similarity(source.name, target.name, rank, (source.identity(), target.identity()))
        for kind, (sources, targets) in kinds.items():
            sides = score_layers(source, target, sources, targets, rank=rank, engine=engine, tick=tick)
            result.kinds.append(KindSimilarity(kind, sources, targets, *sides))
    return result


def shared_kinds(
    source: Base, target: Base, *, attention_only: bool = True
) -> dict[str, tuple[list[Layer], list[Layer]]]:
    """Return what `compare_bases` compares: for each kind that both bases have the layers of the source and the target.

    Raises:
        MismatchError: The bases have no kind of layer in common, or too many of one kind.
    """
    targets = _by_kind(target, attention_only)
    kinds = {kind: (s, targets[kind]) for kind, s in _by_kind(source, attention_only).items() if kind in targets}
    if not kinds:
        got = f"{source.name} ({source.family.label}) and {target.name} ({target.family.label})"
        raise MismatchError("the two bases share no kind of layer", got, "compare bases of related families")
    check_pairs(kinds.values())
    return kinds


def score_layers(
    source: Base,
    target: Base,
    sources: list[Layer],
    targets: list[Layer],
    *,
    rank: int | None = None,
    engine: Engine = CPU,
    tick: Callable[[str], None] = unheard,
) -> Sides:
    """Compare every one of some source layers with every one of some target layers, on both sides.

    Args:
        source: The base that `sources` are layers of.
        target: The base that `targets` are layers of.
        sources: Layers of the source.
        targets: Layers of the target.
        rank: Compare only the leading triplets; None compares whole layers.
        engine: How and where to compute.
        tick: Called with the name of each layer that was read.

    Returns:
        The scores of all pairs on the left and on the right side.
    """
    shape = len(sources), len(targets), 4
    key: list[object] = []
    if engine.cache is not None:
        names = [layer.name for layer in sources], [layer.name for layer in targets]
        key = [
            engine.version,
            rank,
            *(engine.digests(base, of) for base, of in zip((source, target), names, strict=True)),
        ]
        found = engine.cache.read("scores", *key)
        if found is not None and len(found) == 8 * math.prod(shape):
            return _sides(np.frombuffer(found).reshape(shape).copy())
    values = _compare(source, target, sources, targets, rank, engine, tick)
    if engine.cache is not None:
        engine.cache.write(values.tobytes(), "scores", *key)
    return _sides(values)


def _compare(
    source: Base,
    target: Base,
    sources: list[Layer],
    targets: list[Layer],
    rank: int | None,
    engine: Engine,
    tick: Callable[[str], None],
) -> Array:
    """Return phi and chance of the left and of the right side, `[sources, targets, 4]`."""
    values = np.full((len(sources), len(targets), 4), np.nan)

    def compared(base: Base, layers: list[Layer]) -> Groups:
        groups, names = _groups([x.matrix_shape for x in layers], engine.device), [x.name for x in layers]
        found = engine.weights(base, names) if rank is None else (engine.triplets(base, name, rank) for name in names)
        for name, one in zip(names, found, strict=True):
            tick(name)
            _add(groups, one)
        return groups

    i = 0
    for some_s in _within(BUDGET_BYTES, sources):
        groups_s, j = compared(source, some_s), 0
        for some_t in _within(BUDGET_BYTES // 4, targets):
            part = values[i : i + len(some_s), j : j + len(some_t)]
            for side, (s, t) in enumerate(zip(groups_s, compared(target, some_t), strict=True)):
                _scores(s, t, part[..., 2 * side : 2 * side + 2])
            j += len(some_t)
        i += len(some_s)
    return values


def _within(budget: int, layers: list[Layer]) -> Iterator[list[Layer]]:
    """Yield layers in groups: as many as what is held of them fills the budget, one at least."""
    found: list[Layer] = []
    size = 0
    for layer in layers:
        m, n = layer.matrix_shape
        held = 4 * sum(d * (d if d <= GRAM_LIMIT else other) for d, other in ((m, n), (n, m)))
        if found and size + held > budget:
            yield found
            found, size = [], 0
        found.append(layer)
        size += held
    if found:
        yield found


def _by_kind(base: Base, attention_only: bool) -> dict[str, list[Layer]]:
    kinds: dict[str, list[Layer]] = {}
    for layer in base.layers.values():
        if layer.is_attention or not attention_only:
            kinds.setdefault(f"{layer.component}:{layer.kind}", []).append(layer)
    return kinds
