"""One side of some layers, and the scores of all pairs of two such sides: by Gram matrices, or by sketches of them.

A sketch of a Gram matrix `G = X X^T` is `G Z = X (X^T Z)` with `Z [d, k]` of random signs, the same for all layers of a
width: `<G_s, G_t>` is the mean over the columns of `<G_s z, G_t z>` (Hutchinson's estimator), both norms come from the
same products, and the trace is exact. A layer of sketches is never formed as a Gram matrix.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..linalg import Subspace, gram, near_one, to_exact
from ..models.layers import Layer
from .scores import Array, ScoreTable, Sides

# A Gram matrix of at most so many rows for each column of a sketch is as quick as the sketch: `d^2 n` against `4 d n k`
# multiplications, and half of the first is mirrored.
EXACT_ROWS = 8
# Above this side a Gram matrix costs more than the product of the two weights (4096^2 float32: 64 MB).
GRAM_LIMIT = 4096
# Sources whose scores are computed at a time.
ROWS = 256


@dataclass(frozen=True, slots=True)
class _Layer:
    """One side of one layer, `d` wide; `held` is its Gram matrix `[d, d]`, its sketch `[k, d]`, or its factor.

    `norm` is that of the Gram matrix; of a sketched one it is estimated with the scores.
    """

    trace: float
    norm: float
    held: Tensor


class Group:
    """One side of some layers; what is held of those of one width lies in one tensor, where it is made.

    Args:
        sizes: The width of each layer.
        device: Where to compute.
        sketch: Columns of the sketches of wide layers; None makes none.
    """

    def __init__(self, sizes: list[int], device: str | torch.device, sketch: int | None) -> None:
        self.layers: list[_Layer] = []
        self.places: dict[int, list[int]] = {}
        self.of: list[int] = []
        self.sketch = sketch
        for i, d in enumerate(sizes):
            self.of.append(len(self.places.setdefault(d, [])))
            self.places[d].append(i)
        self.stacks = {
            d: torch.empty(shape, device=device)
            for d, found in self.places.items()
            if (shape := self._shape(len(found), d))
        }

    def _shape(self, count: int, d: int) -> tuple[int, ...]:
        if self.is_sketched(d):
            return self.sketch or 0, count, d
        return (count, d, d) if d <= GRAM_LIMIT else ()

    def is_sketched(self, d: int) -> bool:
        """Whether a side of this width is sketched."""
        return self.sketch is not None and is_wide(d, self.sketch)

    def held(self, X: Tensor) -> Tensor:
        """Return what is held of the next layer, in its place."""
        i, d = len(self.layers), X.shape[0]
        if d not in self.stacks:
            return X
        if self.sketch is None or not self.is_sketched(d):
            return gram(X, self.stacks[d][self.of[i]])
        found = self.stacks[d][:, self.of[i]]
        found.copy_((X @ (X.T @ _signs(d, self.sketch, X.device))).T)
        return found


Groups = tuple[Group, Group]


@lru_cache(maxsize=32)
def _signs(d: int, k: int, device: torch.device) -> Tensor:
    """Return the random signs `[d, k]` of a width: always the same ones, so that sketches fit together."""
    bits = torch.randint(0, 2, (d, k), generator=torch.Generator().manual_seed(d))
    return (bits * 2 - 1).float().to(device)


def groups(shapes: list[tuple[int, int]], device: str | torch.device, sketch: int | None) -> Groups:
    """Return empty groups for the left (output) and the right (input) side of some layers."""
    return Group([m for m, _ in shapes], device, sketch), Group([n for _, n in shapes], device, sketch)


def add(both: Groups, layer: Tensor | Subspace) -> None:
    """Add the next layer: a weight, or one that is cut to its leading triplets. Both sides have one trace and norm."""
    if isinstance(layer, Subspace):
        layer = Subspace(layer.U, near_one(layer.S), layer.Vh)
        factors = layer.U * layer.S, layer.Vh.T * layer.S
    else:
        layer = near_one(layer)
        factors = layer, layer.T
    held = [group.held(X) for group, X in zip(both, factors, strict=True)]
    if isinstance(layer, Subspace):
        energy = to_exact(layer.S).double().square()
        trace, norm = float(energy.sum()), float(energy.norm())
    elif all(group.is_sketched(X.shape[0]) for group, X in zip(both, factors, strict=True)):
        rows = to_exact(torch.linalg.vector_norm(layer, dim=1))  # a norm of all numbers is less exact, or slower
        trace, norm = float(rows.double().square().sum()), math.nan
    else:
        X, G = min(zip(factors, held, strict=True), key=lambda pair: pair[0].shape[0])
        G = to_exact(gram(X) if G is X else G)
        trace, norm = float(G.diagonal().double().sum()), float(torch.linalg.vector_norm(G.double()))
    for group, of in zip(both, held, strict=True):
        group.layers.append(_Layer(trace, norm, of))


def score_groups(sources: Groups, targets: Groups, out: Array) -> None:
    """Compare every source with every target.

    Args:
        sources: What is held of the sources.
        targets: And of the targets.
        out: Where to write phi and chance of the left side, then of the right, `[sources, targets, 4]`, or also the
            standard error of each, `[sources, targets, 6]`; all NaN, which stays where sizes differ or a weight is 0.
    """
    each = out.shape[-1] // 2
    for side, (s, t) in enumerate(zip(sources, targets, strict=True)):
        _score(s, t, out[..., each * side : each * (side + 1)])


def tables(values: Array) -> Sides:
    """Return the tables of the left and of the right side, of what `score_groups` writes."""
    each = values.shape[-1] // 2
    left, right = (ScoreTable(*(values[..., place + i] for i in range(each))) for place in (0, each))
    return left, right


def is_wide(d: int, sketch: int) -> bool:
    """Whether a side is so wide that it is sketched."""
    return d > EXACT_ROWS * sketch


def within(budget: int, layers: list[Layer], sketch: int | None) -> Iterator[list[Layer]]:
    """Yield layers in groups: as many as what is held of them fills the budget in bytes, one at least."""
    found: list[Layer] = []
    size = 0
    for layer in layers:
        m, n = layer.matrix_shape
        held = 4 * sum(d * _held(d, other, sketch) for d, other in ((m, n), (n, m)))
        if found and size + held > budget:
            yield found
            found, size = [], 0
        found.append(layer)
        size += held
    if found:
        yield found


def _held(d: int, other: int, sketch: int | None) -> int:
    if sketch is not None and is_wide(d, sketch):
        return sketch
    return d if d <= GRAM_LIMIT else other


def _score(sources: Group, targets: Group, out: Array) -> None:
    """Compare every source with every target on one side; what can be is one matrix product."""
    for d in sources.places.keys() & targets.places.keys():
        rows, columns = sources.places[d], targets.places[d]
        traces = np.array([targets.layers[j].trace for j in columns])
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            chance = np.outer([sources.layers[i].trace for i in some], traces) / d
            if sources.is_sketched(d):
                found = _by_sketch(sources.stacks[d][:, start : start + ROWS], targets.stacks[d], chance)
            else:
                found = _by_gram(sources, targets, d, start, chance)
            out[np.ix_(some, columns)] = found[..., : out.shape[-1]]


def _by_gram(sources: Group, targets: Group, d: int, start: int, chance: Array) -> Array:
    """Return phi, chance and 0 for some sources and all targets of a width; `chance` is that of the inner products."""
    rows, columns = sources.places[d][start : start + ROWS], targets.places[d]
    if d > GRAM_LIMIT:
        inner = np.array(
            [
                [
                    float(torch.linalg.vector_norm(sources.layers[i].held.T @ targets.layers[j].held)) ** 2
                    for j in columns
                ]
                for i in rows
            ]
        )
    else:
        stack = sources.stacks[d][start : start + ROWS]
        inner = (stack.flatten(1) @ targets.stacks[d].flatten(1).T).cpu().numpy().astype(np.float64)
    scale = np.outer([sources.layers[i].norm for i in rows], [targets.layers[j].norm for j in columns])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.stack([inner / scale, chance / scale, 0 * scale], axis=-1)
    return np.where((scale > 0)[..., None], found, np.nan)


def _by_sketch(sources: Tensor, targets: Tensor, chance: Array) -> Array:
    """Return phi, chance and the standard error of the corrected similarity, of sketches `[k, layers, d]`.

    The error is that of the mean over the columns, through the first derivatives of `(a - t) / (sqrt(b c) - t)`, where
    `a` is the inner product, `b` and `c` are the squared norms, and `t` is the chance.
    """
    k = sources.shape[0]
    inner = torch.bmm(sources, targets.transpose(1, 2)).cpu().numpy().astype(np.float64)
    squares = [to_exact(side).double().square().sum(-1).cpu().numpy() for side in (sources, targets)]
    means = [side.mean(0) for side in squares]
    scale = np.sqrt(np.outer(*means))
    with np.errstate(divide="ignore", invalid="ignore"):
        a, room = inner.mean(0), scale - chance
        corrected = (a - chance) / room
        change = [(side / mean - 1) / 2 for side, mean in zip(squares, means, strict=True)]
        moved = (inner - a) / room - corrected * scale / room * (change[0][:, :, None] + change[1][:, None, :])
        error = np.sqrt(np.square(moved).sum(0) / (k * (k - 1)))
        found = np.stack([a / scale, chance / scale, error], axis=-1)
    return np.where((scale > 0)[..., None], found, np.nan)
