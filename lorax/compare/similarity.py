"""How much the singular subspaces of two bases agree, layer by layer.

`Phi = <G_s, G_t>_F / (||G_s||_F ||G_t||_F)` with `G = W W^T` (left, the outputs) or `W^T W` (right, the inputs): LoRA-X
(arXiv 2501.16559), written with Gram matrices, so that full rank needs no decomposition. Two unrelated layers score
`Phi0 = tr G_s tr G_t / (d ||G_s|| ||G_t||)` and not 0, so the corrected value is `(Phi - Phi0) / (1 - Phi0)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..checks import check_rank
from ..compute.engine import CPU, Engine
from ..errors import MismatchError
from ..linalg import decompose
from ..models.base import Base
from ..models.layers import Layer
from ..progress import Progress, counter, silent, unheard
from .scores import Array, Score, Scores, ScoreTable, Sides, check_pairs
from .sides import Groups, add, groups, is_wide, score_groups, tables, within

# How much of the source is held at once while the target streams by.
BUDGET_BYTES = 2**30


def pair_scores(
    source: Tensor, target: Tensor, rank: int | None = None, *, sketch: int | None = None
) -> tuple[Score, Score]:
    """Return the similarity of two weights on the left (output) and on the right (input) side.

    Args:
        source: `[m, n]`, float32.
        target: `[m', n']`, float32, on the same device.
        rank: Compare the weights cut to this many singular triplets; None compares them whole.
        sketch: Columns of the sketches by which sides of more than eight times as many rows are compared; None compares
            exactly.

    Returns:
        Left and right score; a side has NaN where its sizes differ or a weight is zero.
    """
    both: list[Groups] = []
    for weight in (source, target):
        both.append(groups([(weight.shape[0], weight.shape[1])], weight.device, sketch))
        add(both[-1], weight if rank is None else decompose(weight, rank))
    values = np.full((1, 1, 6), np.nan)
    score_groups(both[0], both[1], values)
    left, right = tables(values)
    return left[0, 0], right[0, 0]


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
    sketch: int | None = None,
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
        sketch: As in `pair_scores`.
        engine: How and where to compute.
        tick: Called with the name of each layer that was read.

    Returns:
        The scores of all pairs on the left and on the right side.
    """
    if sketch is not None and not any(is_wide(max(layer.matrix_shape), sketch) for layer in sources + targets):
        sketch = None
    shape = len(sources), len(targets), 4 if sketch is None else 6
    key: list[object] = []
    if engine.cache is not None:
        names = [layer.name for layer in sources], [layer.name for layer in targets]
        key = [
            engine.version,
            rank,
            sketch,
            *(engine.digests(base, of) for base, of in zip((source, target), names, strict=True)),
        ]
        found = engine.cache.read("scores", *key)
        if found is not None and len(found) == 8 * math.prod(shape):
            return tables(np.frombuffer(found).reshape(shape).copy())
    values = _compare(source, target, sources, targets, rank, sketch, engine, tick)
    if engine.cache is not None:
        engine.cache.write(values.tobytes(), "scores", *key)
    return tables(values)


def _compare(
    source: Base,
    target: Base,
    sources: list[Layer],
    targets: list[Layer],
    rank: int | None,
    sketch: int | None,
    engine: Engine,
    tick: Callable[[str], None],
) -> Array:
    """Return what `score_groups` writes of all pairs."""
    values = np.full((len(sources), len(targets), 4 if sketch is None else 6), np.nan)

    def compared(base: Base, layers: list[Layer]) -> Groups:
        both, names = groups([x.matrix_shape for x in layers], engine.device, sketch), [x.name for x in layers]
        found = engine.weights(base, names) if rank is None else (engine.triplets(base, name, rank) for name in names)
        for name, one in zip(names, found, strict=True):
            tick(name)
            add(both, one)
        return both

    i = 0
    for some_s in within(BUDGET_BYTES, sources, sketch):
        groups_s, j = compared(source, some_s), 0
        for some_t in within(BUDGET_BYTES // 4, targets, sketch):
            part = values[i : i + len(some_s), j : j + len(some_t)]
            score_groups(groups_s, compared(target, some_t), part)
            j += len(some_t)
        i += len(some_s)
    return values


def _by_kind(base: Base, attention_only: bool) -> dict[str, list[Layer]]:
    kinds: dict[str, list[Layer]] = {}
    for layer in base.layers.values():
        if layer.is_attention or not attention_only:
            kinds.setdefault(f"{layer.component}:{layer.kind}", []).append(layer)
    return kinds
