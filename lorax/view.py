"""A similarity as the browser's views read it (`view.schema.json`): all pairs, small enough for a workflow file."""

import base64
import math
from typing import Any

import numpy as np

from .base import Base
from .layers import Layer
from .matching import Assignment
from .similarity import KindSimilarity, Score, Similarity

SCHEMA_VERSION = 1
# A pair is one byte: 0 is no value, b is LOWEST + STEP * (b - 1), so 255 is 1. What is lower counts as LOWEST.
LOWEST, STEP = -0.27, 0.005
# 560 x 560 layers fit; above this (half a megabyte of text) only the pairs are kept, without the map.
MOST_CELLS = 400_000


def similarity_view(similarity: Similarity, source: Base, target: Base, assignment: Assignment) -> dict[str, Any]:
    """Return a similarity as plain data, valid by `view.schema.json`.

    A pair has one value, the lower corrected similarity of its two sides, as `Row.corrected`; a layer of the target and
    the layer that feeds it have the plain similarity of both sides too.

    Args:
        similarity: The scores of all pairs of the two bases.
        source: The base that the adapter was made for.
        target: The base that it shall move to.
        assignment: Which source layer feeds which target layer.
    """
    shapes: dict[tuple[int, ...], int] = {}
    tables = [
        _Table(base, [layer for kind in similarity.kinds for layer in kind_layers(kind)], shapes)
        for base, kind_layers in ((source, lambda kind: kind.sources), (target, lambda kind: kind.targets))
    ]
    sources, targets = tables
    fits = sum(len(kind.sources) * len(kind.targets) for kind in similarity.kinds) <= MOST_CELLS
    pairs = [pair for kind in similarity.kinds for pair in _pairs(kind, assignment, sources, targets)]
    return {
        "schema": "lorax-similarity-view",
        "schema_version": SCHEMA_VERSION,
        "source": similarity.source,
        "target": similarity.target,
        "rank": similarity.rank,
        "matching": assignment.matching,
        "shapes": [list(shape) for shape in shapes],
        "sources": sources.to_json(),
        "targets": targets.to_json(),
        "kinds": [
            {
                "kind": kind.kind,
                "sources": [sources.place[layer.name] for layer in kind.sources],
                "targets": [targets.place[layer.name] for layer in kind.targets],
                "corrected": _encode(kind) if fits else None,
            }
            for kind in similarity.kinds
        ],
        "pairs": sorted(pairs, key=lambda pair: pair[0]),
    }


class _Table:
    """The layers of one base in the order of the model, their names cut into block and role, which repeat."""

    def __init__(self, base: Base, layers: list[Layer], shapes: dict[tuple[int, ...], int]) -> None:
        order = {name: i for i, name in enumerate(base.layers)}
        self.blocks: dict[str, int] = {}
        self.roles: dict[str, int] = {}
        self.layers: list[list[int]] = []
        self.place: dict[str, int] = {}
        for layer in sorted(layers, key=lambda layer: order[layer.name]):
            block = layer.block or layer.component
            role = layer.name.removeprefix(block + ".")
            numbers = (self.blocks, block), (self.roles, role), (shapes, layer.shape)
            self.place[layer.name] = len(self.layers)
            self.layers.append([known.setdefault(key, len(known)) for known, key in numbers])

    def to_json(self) -> dict[str, Any]:
        return {"blocks": list(self.blocks), "roles": list(self.roles), "layers": self.layers}


def _pairs(kind: KindSimilarity, assignment: Assignment, sources: _Table, targets: _Table) -> list[list[float | None]]:
    """Return for each target layer its number, the number of the layer that feeds it, left, right and corrected."""
    rows = {layer.name: i for i, layer in enumerate(kind.sources)}
    found: list[list[float | None]] = []
    for j, layer in enumerate(kind.targets):
        i = rows.get(assignment.source_of(layer.name))
        if i is None:
            found.append([targets.place[layer.name], None, None, None, None])
            continue
        left, right = kind.left[i][j], kind.right[i][j]
        values = left.phi, right.phi, _lower(left, right)
        numbers = [round(value, 4) if math.isfinite(value) else None for value in values]
        found.append([targets.place[layer.name], sources.place[kind.sources[i].name], *numbers])
    return found


def _lower(left: Score, right: Score) -> float:
    values = [side.corrected for side in (left, right) if not math.isnan(side.corrected)]
    return min(values, default=math.nan)


def _encode(kind: KindSimilarity) -> str:
    lines = [[_lower(*sides) for sides in zip(*line, strict=True)] for line in zip(kind.left, kind.right, strict=True)]
    values = np.array(lines, dtype=np.float64)
    codes = np.clip(np.round((np.nan_to_num(values) - LOWEST) / STEP), 0, 254) + 1
    return base64.b64encode(np.where(np.isnan(values), 0, codes).astype(np.uint8).tobytes()).decode()
