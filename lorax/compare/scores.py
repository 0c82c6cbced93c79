"""Similarities of pairs of layers: one, a table of all pairs of some layers, and tables found by names."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import MismatchError
from ..models.layers import Layer

Array = NDArray[np.float64]
# Pairs that are held at once, of 32 to 48 bytes each: up to 0.8 gigabytes.
# The largest known bases have a hundredth of it.
MOST_PAIRS = 2**24
# An estimate within so many standard errors of what decides is computed exactly: 95 % of a normal distribution are.
ERRORS = 2.0
# Below this room between chance and 1 a corrected value says nothing.
ROOM = 1e-6


@dataclass(frozen=True, slots=True)
class Score:
    """The similarity of two layers on one side. NaN: no value.

    Attributes:
        phi: The similarity.
        chance: What unrelated layers score.
        error: Standard error of `corrected` where it was estimated by a sketch; 0 where it is exact.
    """

    phi: float
    chance: float
    error: float = 0.0

    @property
    def corrected(self) -> float:
        """`(phi - chance) / (1 - chance)`: 0 by chance, 1 for equal subspaces; NaN where chance is already 1."""
        room = 1 - self.chance
        return (self.phi - self.chance) / room if room > ROOM else math.nan

    def is_near(self, threshold: float) -> bool:
        """Whether it is an estimate too near to a threshold to say on which side it is."""
        return self.error > 0 and abs(self.corrected - threshold) <= ERRORS * self.error


@dataclass(frozen=True, slots=True, eq=False)
class ScoreTable:
    """The scores of all pairs of some layers on one side; `table[i, j]` is that of one pair.

    Attributes:
        phi: `[sources, targets]`; NaN: no value.
        chance: The same.
        error: The same; None where all are exact.
    """

    phi: Array
    chance: Array
    error: Array | None = None

    def __getitem__(self, pair: tuple[int, int]) -> Score:
        error = 0.0 if self.error is None else float(self.error[pair])
        return Score(float(self.phi[pair]), float(self.chance[pair]), error)

    @property
    def corrected(self) -> Array:
        """`Score.corrected` of each pair."""
        room = 1 - self.chance
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(room > ROOM, (self.phi - self.chance) / room, np.nan)

    def part(self, rows: Sequence[int], columns: Sequence[int]) -> "ScoreTable":
        """Return the table of some of its sources and targets."""
        place = np.ix_(rows, columns)
        return ScoreTable(self.phi[place], self.chance[place], None if self.error is None else self.error[place])


Sides = tuple[ScoreTable, ScoreTable]


def mean_corrected(sides: Sides) -> Array:
    """Return the mean corrected similarity `[sources, targets]` of the sides that have one; NaN where none has."""
    left, right = (side.corrected for side in sides)
    return np.where(np.isnan(left), right, np.where(np.isnan(right), left, (left + right) / 2))


def mean_error(sides: Sides) -> Array:
    """Return the most that the standard error of `mean_corrected` can be; 0, of no shape where all are exact."""
    if all(side.error is None for side in sides):
        return np.zeros(())
    left, right = (0 * side.phi if side.error is None else side.error for side in sides)
    return np.where(np.isnan(left), right, np.where(np.isnan(right), left, (left + right) / 2))


def finite_mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are numbers; NaN where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


class Scores(Mapping[tuple[str, str], tuple[Score, Score]]):
    """Left and right score of pairs of layers, by (source layer name, target layer name): what is known of two bases.

    Args:
        known: Others of the same bases, whose pairs it has too.
    """

    def __init__(self, *known: "Scores") -> None:
        self._tables = [table for scores in known for table in scores._tables]
        self._pairs = {pair: sides for scores in reversed(known) for pair, sides in scores._pairs.items()}

    def add(self, sources: Sequence[Layer], targets: Sequence[Layer], sides: Sides) -> None:
        """Add all pairs of some layers: the left and the right scores, which count before what was known."""
        rows, columns = ({layer.name: i for i, layer in enumerate(side)} for side in (sources, targets))
        self._tables.insert(0, (rows, columns, sides))

    def add_pair(self, source: Layer, target: Layer, scores: tuple[Score, Score]) -> None:
        """Add one pair: the left and the right score."""
        self._pairs[source.name, target.name] = scores

    def sides(self, sources: Sequence[Layer], targets: Sequence[Layer]) -> Sides | None:
        """Return the scores of all pairs of these layers; None where one of them is not known."""
        for rows, columns, (left, right) in self._tables:
            if all(layer.name in rows for layer in sources) and all(layer.name in columns for layer in targets):
                places = [rows[layer.name] for layer in sources], [columns[layer.name] for layer in targets]
                return left.part(*places), right.part(*places)
        return None

    def __getitem__(self, pair: tuple[str, str]) -> tuple[Score, Score]:
        if pair in self._pairs:
            return self._pairs[pair]
        for rows, columns, (left, right) in self._tables:
            if pair[0] in rows and pair[1] in columns:
                place = rows[pair[0]], columns[pair[1]]
                return left[place], right[place]
        raise KeyError(pair)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        tables = ((source, target) for rows, columns, _ in self._tables for source in rows for target in columns)
        return iter(dict.fromkeys([*self._pairs, *tables]))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def check_pairs(blocks: Iterable[tuple[Sequence[Layer], Sequence[Layer]]]) -> None:
    """Refuse to compare more pairs than can be held.

    Raises:
        MismatchError: All pairs of the layers of each block are too many.
    """
    pairs = sum(len(sources) * len(targets) for sources, targets in blocks)
    if pairs > MOST_PAIRS:
        fix = "check the bases: no known model has as many layers of one kind"
        raise MismatchError("too many pairs of layers to compare", f"{pairs}, at most {MOST_PAIRS}", fix)
