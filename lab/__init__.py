"""The laboratory: which transfer works, measured on small diffusion models that it trains itself. `python -m lab`.

`LORAX_LAB=large` makes all of it larger, for a GPU; where there is one, it is used.
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
class Scale:
    """How large the laboratory is.

    Attributes:
        folder: Of what belongs to this scale alone, in each of the three folders below.
        pixels: Side of a picture.
        width: Of the first level of all models but `narrow`.
        narrow: Of that of `narrow`.
        rank: Of LoRA-X and of the subspaces: a quarter of the widest layers, half of the others.
        batch: Pictures in a step of the training of a base.
        length: How many times the steps of SMALL a base is trained for.
    """

    folder: str
    pixels: int
    width: int
    narrow: int
    rank: int
    batch: int
    length: int


SMALL, LARGE = Scale("", 32, 48, 32, 24, 32, 1), Scale("large", 64, 96, 64, 48, 64, 2)
SCALE = {"small": SMALL, "large": LARGE}[os.environ.get("LORAX_LAB", "small")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What is downloaded and trained; not in the repository.
CACHE = HERE / "cache" / SCALE.folder
# What was measured: a file for each style and seed; and the weights of the best run.
RESULTS, CHECKPOINTS = HERE / "results" / SCALE.folder, HERE / "checkpoints" / SCALE.folder


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
