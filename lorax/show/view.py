"""A similarity as the browser's views read it (`view.schema.json`): all pairs, small enough for a workflow file."""

import base64
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..compare.matching import Assignment
from ..compare.similarity import KindSimilarity, Similarity
from ..models.base import Base
from ..models.layers import Layer
from ..transfer.report import block_and_role, lower

SCHEMA_VERSION = 2
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
    sources = _Table(source, [layer for kind in similarity.kinds for layer in kind.sources], shapes)
    targets = _Table(target, [layer for kind in similarity.kinds for layer in kind.targets], shapes)
    fits = sum(len(kind.sources) * len(kind.targets) for kind in similarity.kinds) <= MOST_CELLS
    pairs = {pair[0]: pair for kind in similarity.kinds for pair in _pairs(kind, assignment, sources, targets)}
    return {
        "schema": "lorax-similarity-view",
        "schema_version": SCHEMA_VERSION,
        "source": similarity.source,
        "target": similarity.target,
        "rank": similarity.rank,
        "matching": assignment.matching,
        "scale": {"lowest": LOWEST, "step": STEP},
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
        "pairs": [list(pairs[place]) for place in sorted(pairs)],
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
            block, role = block_and_role(layer)
            self.place[layer.name] = len(self.layers)
            self.layers.append(
                [
                    self.blocks.setdefault(block, len(self.blocks)),
                    self.roles.setdefault(role, len(self.roles)),
                    shapes.setdefault(layer.shape, len(shapes)),
                ]
            )

    def to_json(self) -> dict[str, Any]:
        return {"blocks": list(self.blocks), "roles": list(self.roles), "layers": self.layers}


# Number of a target layer, of the layer that feeds it, left, right and corrected similarity.
Pair = tuple[int, int | None, float | None, float | None, float | None]


def _pairs(kind: KindSimilarity, assignment: Assignment, sources: _Table, targets: _Table) -> Iterator[Pair]:
    rows = {layer.name: i for i, layer in enumerate(kind.sources)}
    for j, layer in enumerate(kind.targets):
        i = rows.get(assignment.source_of(layer.name))
        if i is None:
            yield targets.place[layer.name], None, None, None, None
            continue
        left, right = kind.left[i, j], kind.right[i, j]
        source, corrected = sources.place[kind.sources[i].name], lower(left, right)
        yield targets.place[layer.name], source, _rounded(left.phi), _rounded(right.phi), _rounded(corrected)


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _encode(kind: KindSimilarity) -> str:
    values = np.fmin(kind.left.corrected, kind.right.corrected)
    codes = np.clip(np.round((np.nan_to_num(values) - LOWEST) / STEP), 0, 254) + 1
    return base64.b64encode(np.where(np.isnan(values), 0, codes).astype(np.uint8).tobytes()).decode()
