"""Many transfers in one process: its memory must not grow."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lorax import Cache, Engine, TransferOptions, load_adapter, open_base, save_adapter, transfer_adapter
from lorax.options import Method

from . import seeds

# The first transfers fill what is kept for good: tables of families, buffers of the allocator.
WARM_UP = 20


def soak(count: int, folder: Path) -> dict[str, Any]:
    """Move adapters of every kind `count` times, by every method in turn, and measure the resident memory after each.

    Returns:
        The number of transfers, the resident memory at the start and at the end of what is measured, and the slope of
        the straight line through it, in bytes for each transfer.
    """
    files: list[Path] = []
    for name, content in seeds.adapters().items():
        if name not in ("indexed", "flux", "lora-x"):  # of the full-size models, or of one base
            files.append(folder / f"{name}.safetensors")
            files[-1].write_bytes(content)
    paths = [seeds.base_file(folder / f"{i}.safetensors", change=0.2 * i) for i in range(2)]
    engine = Engine(cache=Cache(folder / "cache", 2**26))
    process, resident = psutil.Process(), list[int]()
    for i in range(WARM_UP + count):
        source, target = map(open_base, paths)
        adapter = load_adapter(files[i % len(files)], source)
        method = list(Method)[i // len(files) % len(Method)]
        moved, _ = transfer_adapter(
            adapter, source, target, TransferOptions(method=method, rank=8, lora_rank=4), engine=engine
        )
        save_adapter(moved, folder / "moved")
        if i % 10 == 0:  # cycles are no leak, and to look for them takes longer than a transfer
            gc.collect()
        resident.append(process.memory_info().rss)
    measured = resident[WARM_UP:]
    slope = float(np.polyfit(np.arange(len(measured)), measured, 1)[0])
    return {"transfers": count, "first": measured[0], "last": measured[-1], "bytes_per_transfer": round(slope, 1)}
