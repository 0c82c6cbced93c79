"""The laboratory: which transfer works, measured on small diffusion models that it trains itself. `python -m lab`."""

from pathlib import Path

HERE = Path(__file__).parent
# What is downloaded and trained; not in the repository.
CACHE = HERE / "cache"
# What was measured: a file for each style and seed; and the weights of the best run.
RESULTS, CHECKPOINTS = HERE / "results", HERE / "checkpoints"
