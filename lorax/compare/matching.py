"""Which source layer feeds which target layer, where blocks were pruned or added.

A stage is a run of like blocks: the transformer blocks of one resolution of a U-Net on its way down, or the
double-stream blocks of a transformer. Within a stage a block pair scores the sum of the corrected similarities of its
modules (q with q, k with k), and the order-preserving one-to-one assignment of the highest total is taken, by dynamic
programming. The published rule (LoRA-X, arXiv 2501.16559) takes for every module of the target the most similar one of
the source.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ..compute.engine import CPU, Engine
from ..errors import FormatError
from ..files.tensorfile import read_json
from ..models.base import Base
from ..models.layers import Layer, LayerTable
from ..options import SKETCH, Matching, choice
from ..progress import Progress, counter, silent
from .scores import ERRORS, Array, Scores, check_pairs, mean_corrected, mean_error
from .similarity import score_layers

ASSIGNMENT_SCHEMA = "lorax-assignment"
NUMBERS = re.compile(r"\d+")
LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.(.*)")


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where each block (or layer) of a target gets its updates from.

    Attributes:
        matching: How it was made: a `Matching`, or `file`.
        pairs: Target block or layer -> source block or layer; empty: it gets none. What is not in it goes by its name.
        ways: Target block or layer -> how it was paired: `name`, `similarity` or `position`.
        scores: Left and right similarity of the layer pairs that were compared on the way.
        components: Target component -> the source's component that does the same.
    """

    matching: str
    pairs: Mapping[str, str]
    ways: Mapping[str, str] = field(default_factory=dict[str, str])
    scores: Scores = field(default_factory=Scores)
    components: Mapping[str, str] = field(default_factory=dict[str, str])

    def source_of(self, target: str) -> str:
        """Return the name of the source layer that feeds a layer of the target; empty if none does."""
        parts = target.split(".")
        for end in range(len(parts), 0, -1):
            source = self.pairs.get(".".join(parts[:end]))
            if source is not None:
                return ".".join([source, *parts[end:]]) if source else ""
        component = self.components.get(parts[0], parts[0])
        return ".".join([component, *parts[1:]]) if component else ""

    @property
    def summary(self) -> list[str]:
        """What is to be said of it: a line for the blocks that were not paired by name; nothing if all were."""
        lines: list[str] = []
        for way in ("similarity", "position", "file"):
            found = [source for target, source in self.pairs.items() if self.ways.get(target) == way]
            if found:
                fed = sum(map(bool, found))
                lines.append(f"paired by {way}: {fed} of {len(found)} blocks of the target get an update")
        return lines

    def to_json(self) -> dict[str, object]:
        """Return it as plain data, to be saved, edited and fed back."""
        return {
            "schema": ASSIGNMENT_SCHEMA,
            "schema_version": 1,
            "matching": self.matching,
            "pairs": dict(self.pairs),
            "ways": dict(self.ways),
        }


def load_assignment(path: Path, source: Base, target: Base) -> Assignment:
    """Read a saved (and perhaps edited) assignment, or the one in a transfer report.

    Raises:
        FormatError: The file is none, or names a block that the bases do not have.
    """
    try:
        loaded = read_json(path)
        loaded = loaded.get("assignment", loaded)
        if loaded["schema"] != ASSIGNMENT_SCHEMA or loaded["schema_version"] != 1:
            raise KeyError
        pairs = {str(key): str(value) for key, value in loaded["pairs"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        fix = "give a file written by --save-assignment, or a transfer report"
        raise FormatError("not an assignment of blocks", str(path), fix) from error
    for names, table, side in ((pairs, target, "target"), (filter(None, pairs.values()), source, "source")):
        known = {*table.layers, *(layer.block for layer in table.layers.values())}
        if unknown := sorted(set(names) - known):
            fix = f"take names such as {next(iter(table.layers))}, or its block"
            raise FormatError(f"the assignment names what the {side} does not have", f"{unknown[0]} in {path}", fix)
    return Assignment("file", pairs, dict.fromkeys(pairs, "file"), components=_components(source, target))


def match_bases(
    source: Base,
    target: Base,
    matching: str = "auto",
    *,
    scores: Scores | None = None,
    sketch: int | None = SKETCH,
    engine: Engine = CPU,
    progress: Progress = silent,
) -> Assignment:
    """Decide which source layer feeds which target layer.

    Args:
        source: The base that the adapter was made for.
        target: The base that it shall work on.
        matching: `auto`: by number where a stage has the same blocks in both, else by similarity, in order. `name`: by
            name only. `order`: by similarity, in order, in every stage. `argmax`: every module of the target takes the
            most similar module of the same role in the stage, in any order and as often as it comes (the published
            rule).
        scores: What is known of these two bases, which is not computed again; what is computed is added.
        sketch: Columns of the sketches by which wide layers are compared (see `lorax.pair_scores`); where these leave
            open which of two blocks is the better one, the stage is compared exactly. None compares all exactly.
        engine: How and where to compute.
        progress: Called with (done, total, layer name).

    Raises:
        OptionError: `matching` is unknown.
        MismatchError: There are too many blocks to compare.
        NumericsError: A weight holds NaN or Inf.
    """
    matching = choice(Matching, matching)
    stages_s = _stages(source.layers)
    pairs: dict[str, str] = {}
    ways: dict[str, str] = {}
    scores = Scores() if scores is None else scores
    compared: list[tuple[list[_Block], list[_Block]]] = []
    for stage, blocks_t in _stages(target.layers).items():
        blocks_s = stages_s.get(stage, [])
        places = {block.place: block.name for block in blocks_s}
        if blocks_s and (
            matching in (Matching.in_order, Matching.argmax)
            or (matching is Matching.auto and list(places) != [b.place for b in blocks_t])
        ):
            compared.append((blocks_s, blocks_t))
        else:
            pairs |= {block.name: places.get(block.place, "") for block in blocks_t}
            ways |= dict.fromkeys((block.name for block in blocks_t), "name")
    roles = [pair for blocks in compared for pair in _roles(*blocks)]
    check_pairs(roles)
    new = [(s, t) for s, t in roles if scores.sides(s, t) is None]
    tick = counter(progress, sum(len(s) + len(t) for s, t in new))
    with engine.remembering(source, target):
        for sources, targets in new:
            sides = score_layers(source, target, sources, targets, sketch=sketch, engine=engine, tick=tick)
            scores.add(sources, targets, sides)
        for blocks in compared:
            for sources, targets in _roles(*blocks) if _is_open(*blocks, scores) else ():
                scores.add(sources, targets, score_layers(source, target, sources, targets, engine=engine))
    for blocks_s, blocks_t in compared:
        found, way = (_argmax if matching is Matching.argmax else _in_order)(blocks_s, blocks_t, scores)
        pairs |= found
        ways |= dict.fromkeys(found, way)
    return Assignment(str(matching), pairs, ways, scores, _components(source, target))


@dataclass(frozen=True, slots=True)
class _Block:
    """A block: its name, its numbers within the stage, and its layers by role."""

    name: str
    place: tuple[int, ...]
    layers: dict[str, Layer] = field(default_factory=dict[str, Layer])

    @property
    def compared(self) -> dict[str, Layer]:
        """The layers by which it is told from others: its attention projections; where it has none, all."""
        return {role: layer for role, layer in self.layers.items() if layer.is_attention} or self.layers


def _stages(table: LayerTable) -> dict[str, list[_Block]]:
    """Return the blocks of each stage in order: the stage is what stays of a name without the numbers of the block.

    The levels of a U-Net are part of the stage, on the way up counted from the end, where the resolution is the same.
    """
    layers = [layer for layer in table.values() if layer.is_main and layer.block]
    levels = [int(up.group(2)) for layer in layers if (up := LEVEL.match(layer.path)) and up.group(1) == "up"]
    stages: dict[str, dict[str, _Block]] = {}
    for layer in layers:
        path, level = layer.block.partition(".")[2], ""
        if found := LEVEL.match(path):
            way, number, path = found.groups()
            level = f"{way}{int(number) if way == 'down' else max(levels) - int(number)}."
        place = tuple(map(int, NUMBERS.findall(path)))
        blocks = stages.setdefault(level + NUMBERS.sub("*", path), {})
        blocks.setdefault(layer.block, _Block(layer.block, place)).layers[layer.role] = layer
    return {stage: sorted(blocks.values(), key=lambda block: block.place) for stage, blocks in stages.items()}


def _roles(blocks_s: list[_Block], blocks_t: list[_Block]) -> list[tuple[list[Layer], list[Layer]]]:
    """Return the layers to compare, role by role."""
    compared = [[block.compared for block in blocks] for blocks in (blocks_s, blocks_t)]
    roles = dict.fromkeys(role for layers in compared[0] for role in layers)
    both = [[[layers[role] for layers in side if role in layers] for side in compared] for role in roles]
    return [(sources, targets) for sources, targets in both if targets]


def _is_open(blocks_s: list[_Block], blocks_t: list[_Block], scores: Scores) -> bool:
    """Whether the errors of estimated scores leave open which block of the source is the most similar to one."""
    values, errors = _block_values(blocks_s, blocks_t, scores)
    if not errors.any():
        return False
    values = np.nan_to_num(values, nan=-np.inf)
    for value, error in zip(values.T, errors.T, strict=True):
        best = int(value.argmax())
        apart = ERRORS * np.hypot(error, error[best])
        others = np.arange(len(value)) != best
        if value[best] > ERRORS * error[best] and (value[best] - value < apart)[others].any():
            return True
    return False


def _values(sources: list[Layer], targets: list[Layer], scores: Scores) -> tuple[Array, Array]:
    """Return the mean corrected similarity of both sides, `[sources, targets]`, and its standard error.

    NaN where no side can be compared.
    """
    sides = scores.sides(sources, targets)
    if sides is None:
        return np.full((len(sources), len(targets)), np.nan), np.zeros(())
    return mean_corrected(sides), np.nan_to_num(mean_error(sides))


def _argmax(blocks_s: list[_Block], blocks_t: list[_Block], scores: Scores) -> tuple[dict[str, str], str]:
    found: dict[str, str] = {}
    for sources, targets in _roles(blocks_s, blocks_t):
        values, _ = _values(sources, targets, scores)
        for j in np.flatnonzero(~np.isnan(values).all(0)).tolist():
            found[targets[j].name] = sources[int(np.nanargmax(values[:, j]))].name
    return found, "similarity"


def _in_order(blocks_s: list[_Block], blocks_t: list[_Block], scores: Scores) -> tuple[dict[str, str], str]:
    table, _ = _block_values(blocks_s, blocks_t, scores)
    if np.isnan(table).all():
        chosen, way = spread(len(blocks_s), len(blocks_t)), "position"
    else:
        chosen, way = best_in_order(table), "similarity"
    fed = {blocks_t[j].name: blocks_s[i].name for i, j in chosen}
    return {block.name: fed.get(block.name, "") for block in blocks_t}, way


def _block_values(blocks_s: list[_Block], blocks_t: list[_Block], scores: Scores) -> tuple[Array, Array]:
    """Return what each pair of blocks is worth, the sum over the roles that both have, and its standard error.

    NaN where none has a value.
    """
    compared_s, compared_t = ([block.compared for block in blocks] for blocks in (blocks_s, blocks_t))
    shape = len(blocks_s), len(blocks_t)
    table, known, squares = np.zeros(shape), np.zeros(shape, bool), np.zeros(shape)
    for role in sorted({role for layers in compared_s for role in layers}):
        rows, columns = ([i for i, x in enumerate(side) if role in x] for side in (compared_s, compared_t))
        layers = [compared_s[i][role] for i in rows], [compared_t[j][role] for j in columns]
        values, errors = _values(*layers, scores)
        place = np.ix_(rows, columns)
        table[place] += np.nan_to_num(values)
        known[place] |= ~np.isnan(values)
        squares[place] += np.square(errors)
    table[~known] = np.nan
    return table, np.sqrt(squares, out=squares)


def best_in_order(values: ArrayLike) -> list[tuple[int, int]]:
    """Return the pairs (i, j), rising in both, of the highest total value: sequence alignment by dynamic programming.

    Args:
        values: What each pair is worth, `[sources, targets]`; NaN, 0 and less are never taken.
    """
    worth = np.nan_to_num(np.atleast_2d(np.asarray(values, np.float64)))
    rows, columns = worth.shape
    best = np.zeros((rows + 1, columns + 1))
    for i, line in enumerate(worth):
        np.maximum.accumulate(np.maximum(best[i, 1:], best[i, :-1] + line), out=best[i + 1, 1:])
    pairs: list[tuple[int, int]] = []
    i, j = rows, columns
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]


def spread(sources: int, targets: int) -> list[tuple[int, int]]:
    """Return pairs (i, j) that spread the shorter of two sequences evenly over the longer, first and last kept."""
    short, long = min(sources, targets), max(sources, targets)
    places = [round(k * (long - 1) / max(short - 1, 1)) for k in range(short)]
    return [(k, place) if sources <= targets else (place, k) for k, place in enumerate(places)]


def _components(source: Base, target: Base) -> dict[str, str]:
    """Return for each component of the target's family the source's that does the same; empty: none does."""
    kinds = {encoder.kind: encoder.component for encoder in source.family.text_encoders}
    found = {encoder.component: kinds.get(encoder.kind, "") for encoder in target.family.text_encoders}
    return found | {target.family.component: source.family.component}
