"""The laboratory: which transfer works, measured on small diffusion models that it trains itself. `python -m lab`."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
# What is downloaded and trained; not in the repository.
CACHE = HERE / "cache"
# What was measured: a file for each style and seed; and the weights of the best run.
RESULTS, CHECKPOINTS = HERE / "results", HERE / "checkpoints"


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
