"""How far updates are from those of another formula or program.

`LORAX_FIGURES=file.json` writes the largest relative difference of each kind to each oracle.
"""

import json
import os
from pathlib import Path

import torch

from tests.tensors import TOLERANCE

FIGURES: dict[str, float] = {}


def agree(oracle, ours, theirs, limit=TOLERANCE[torch.float32]):
    """Compare two updates, and keep the largest difference."""
    theirs = theirs.double().reshape(ours.shape)
    difference = float((ours.double() - theirs).norm() / theirs.norm())
    FIGURES[oracle] = max(FIGURES.get(oracle, 0.0), difference)
    if path := os.environ.get("LORAX_FIGURES"):
        kept = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        Path(path).write_text(json.dumps(dict(sorted((kept | FIGURES).items())), indent=1) + "\n")
    assert difference < limit, oracle
    assert float(theirs.norm()) > 1e-3, "the oracle did nothing"
