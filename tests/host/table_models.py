"""A pair of small checkpoints of one kind of model, and which of their weights the adapters of the table are for."""

import re
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from lorax import Base, open_base
from lorax.compare.matching import Assignment, match_bases
from lorax.compare.similarity import pair_scores

PREFIX = "model.diffusion_model."
ADAPTED = re.compile(r"attn|attention|ff|mlp|feed_forward|proj_in|proj_out", re.IGNORECASE)
Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Unit:
    """What one module of an adapter file changes: a parameter of the model, or some rows of it.

    Attributes:
        parameter: Its name in the checkpoint, without the prefix.
        rows: The rows; all of them unless it is one layer of a fused weight.
        module: How the file calls it.
        parts: The tensors of the file, by what follows the module.
    """

    parameter: str
    rows: slice
    module: str
    parts: Parts = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """Source and target, as our package opens them and as the files hold them.

    Attributes:
        name: The column of the table.
        folder: Where the files lie.
        names: Module -> what LoRA files in kohya's naming call it.
        source: The base that the adapters are for.
        target: The base that they are moved to.
        before: The parameters of the source.
        after: The parameters of the target.
        assignment: Layer to layer, compared once.
        rank: Half of the width of the model.
    """

    name: str
    folder: Path
    names: dict[str, str]
    source: Base
    target: Base
    before: Parts
    after: Parts
    assignment: Assignment
    rank: int

    def rows_of(self, parameter):
        """Return the rows of each layer that lies in a weight."""
        found = [layer.rows for layer in self.target.layers.values() if f"{layer.original}.weight" == parameter]
        return [slice(*(rows or (None,))) for rows in sorted(found, key=lambda rows: rows or ())]

    def units(self, on):
        """Return the modules of an adapter, the tensors to be made yet."""
        return self._vectors() if on == "vector" else self._weights(on)

    def layer_units(self):
        """Return one unit for each layer: LoRA-X knows no fused weight."""
        chosen = {unit.parameter for unit in self._weights("matrix")}
        layers = [layer for layer in self.source.layers.values() if f"{layer.original}.weight" in chosen]
        return [Unit(f"{layer.original}.weight", slice(*(layer.rows or (None,))), layer.name) for layer in layers]

    def _weights(self, on):
        layers = [layer for layer in self.source.layers.values() if layer.block]
        kernel = {"matrix": ((), (1, 1)), "conv": ((3, 3),)}[on]
        layers = [
            layer for layer in layers if layer.shape[2:] in kernel and (on == "conv" or ADAPTED.search(layer.kind))
        ]
        originals = _ends({layer.original: layer.kind for layer in layers})
        return [Unit(f"{module}.weight", slice(None), self.names[module]) for module in originals]

    def _vectors(self):
        known = {
            vector.original: vector.kind
            for vector in self.source.vectors.values()
            if vector.block and re.fullmatch(r".*\.(weight|bias)", vector.original)
        }
        modules = {key.rpartition(".")[0] for key in _ends(known)} & self.names.keys()
        return [
            Unit(key, slice(None), self.names[key.rpartition(".")[0]])
            for key in known
            if key.rpartition(".")[0] in modules
        ]


def _ends(kinds):
    """Return one name of each kind, by turns the first and the last."""
    named = {}
    for name, kind in kinds.items():
        named.setdefault(kind, []).append(name)
    chosen = {names[-(turn % 2)] for turn, names in enumerate(named.values())}
    return [name for name in kinds if name in chosen]


def open_pair(name, folder, names):
    """Open both checkpoints and compare their layers once."""
    source, target = (open_base(folder / f"{side}.safetensors") for side in ("source", "target"))
    before, after = (
        {key.removeprefix(PREFIX): value for key, value in load_file(folder / f"{side}.safetensors").items()}
        for side in ("source", "target")
    )
    pair = Pair(name, folder, names, source, target, before, after, match_bases(source, target), 0)
    chosen = [layer for unit in pair.units("matrix") for layer in _layers(source, unit.parameter)]
    chosen += [layer for unit in pair.units("conv") for layer in _layers(source, unit.parameter)]
    for layer in chosen:
        found = pair_scores(source.weight(layer.name), target.weight(layer.name))
        pair.assignment.scores.add_pair(layer, layer, found)
    widths = sorted(min(layer.matrix_shape) for layer in chosen)
    return replace(pair, rank=widths[len(widths) // 2] // 2)


def _layers(base, parameter):
    return [layer for layer in base.layers.values() if f"{layer.original}.weight" == parameter]


def randomness(*names):
    """Return a generator of random tensors that depends on these names only."""
    generator = torch.Generator().manual_seed(zlib.crc32(" ".join(names).encode()))
    return lambda *shape: torch.randn(shape, generator=generator)
