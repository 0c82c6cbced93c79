"""A library of 200 adapters moved between two SD 1.5: `python -m benchmarks.migrate [--profile smoke|full]`.

Writes benchmarks/results/migrate-<profile>.json and, in full, docs/images/migrate.png.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from lorax import Adapter, LoraLayer, open_base, save_adapter
from lorax.models.base import Base

from .__main__ import RESULTS, hardware, run

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "migrate.png"
RANKS, NAMINGS = (4, 8, 16, 32, 32, 64, 128), ("kohya", "diffusers", "original")
WAYS = {
    "copy": (("local", 1), ("local", 2), ("ray", 1), ("ray", 2), ("ray", 4)),
    "project": (("local", 2), ("ray", 2)),
}
# The extrapolation: machines of so many cores on one shared disk of so many bytes a second.
MACHINES, CORES, ADAPTERS, SHARED_DISK = 64, 16, 100_000, 5e9


def library(folder: Path, base: Base, count: int) -> float:
    """Write adapters of mixed rank and spelling for the attention layers, five of them broken; return their bytes."""
    generator = torch.Generator().manual_seed(0)
    layers = [layer for layer in base.layers.values() if layer.is_attention]
    for number, rank, naming in zip(range(count), itertools.cycle(RANKS), itertools.cycle(NAMINGS)):
        made = {}
        for layer in layers:
            m, n = layer.matrix_shape
            up, down = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
            made[layer.name] = LoraLayer(layer, up.half(), down.half(), float(rank))
        path = folder / f"group {number % 7}" / f"style-{number:03d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_adapter(Adapter(path.name, base.family, naming, made), path, naming=naming)
        if number % (count // 5) == 1:
            path.write_bytes(path.read_bytes()[: 1000 * number + 9])
    return float(sum(path.stat().st_size for path in folder.rglob("*.safetensors")))


def lorax(*words: object, cache: str) -> float:
    """Return how long a command takes, the start of Python included."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "lorax", *map(str, words)]
    subprocess.run(command, env=os.environ | {"LORAX_CACHE": cache}, capture_output=True, check=False)
    return time.perf_counter() - start


def copying(source: Path, target: Path) -> float:
    """Return how long the bare reading and writing of all bytes takes: what the disk allows."""
    start = time.perf_counter()
    for path in sorted(source.rglob("*.safetensors")):
        content = path.read_bytes()
        with (target / path.name).open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
    return time.perf_counter() - start


def extrapolated(seconds: list[list[float]], size: float, prepared: float) -> dict[str, Any]:
    """Simulate a cluster: tasks with the measured times, drawn at random, each to the core that is free first.

    Assumptions: a core does a task in the time that it took here; the shared disk serves all at SHARED_DISK; the first
    adapter (with all the subspaces) delays everybody once; Ray adds nothing that was not measured here.
    """
    draw = random.Random(0)
    free = [prepared] * (MACHINES * CORES)
    per_file = size / len(seconds)
    for number in range(ADAPTERS):
        core = number % len(free)  # tasks are short against the job: the next free core is close to the next in turn
        read, move, write = draw.choice(seconds)
        free[core] += max(read + move + write, 2 * per_file / SHARED_DISK * len(free))
    return {
        "adapters": ADAPTERS, "machines": MACHINES, "cores_each": CORES, "hours": max(free) / 3600,
        "hours_by_disk_alone": 2 * per_file * ADAPTERS / SHARED_DISK / 3600,
        "shared_disk_bytes_per_second": SHARED_DISK,
        "simulated": True,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", choices=["full", "smoke"], default="full")
    profile = parser.parse_args().profile
    count, channels, sample = (200, 320, 4) if profile == "full" else (10, 64, 2)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run("make", "sd1", place, str(channels))
        source, target = folder / "source.safetensors", folder / "target.safetensors"
        (folder / "library").mkdir()
        size = library(folder / "library", open_base(source), count)
        print(f"{count} adapters, {size / 1e9:.2f} GB", flush=True)
        (folder / "copied").mkdir()
        disk = copying(folder / "library", folder / "copied")
        shutil.rmtree(folder / "copied")
        bases = ("--source", source, "--target", target)
        sound = [p for p in sorted((folder / "library").rglob("*.safetensors")) if p.stat().st_size > 10**6]
        for method in WAYS:
            files = random.Random(0).sample(sound, sample)
            loop = sum(
                lorax("transfer", path, *bases, "-o", folder / "one", "--method", method, "--no-cache", cache="off")
                for path in files
            )
            loop *= count / sample
            rows.append(
                {"who": "shell-loop", "method": method, "workers": 1, "seconds": loop, "counted_up_from": sample}
            )
            print(rows[-1], flush=True)
            for engine, workers in WAYS[method]:
                out, cache, report = folder / "out", folder / "cache", folder / "report.json"
                more = ("--engine", engine, "--workers", workers, "--method", method, "--report", report)
                took = lorax("migrate", folder / "library", *bases, "-o", out, *more, cache=str(cache))
                records = json.loads(report.read_text())["records"]
                times = [record["seconds"] for record in records if record["status"] == "done"]
                shares = [sum(part) / sum(map(sum, times)) for part in zip(*times, strict=True)]
                row = {
                    "who": engine, "method": method, "workers": workers, "seconds": took,
                    "done": len(times), "failed": sum(record["status"] == "failed" for record in records),
                    "files_per_second": count / took, "times_faster_than_loop": loop / took,
                    "share_reading_moving_writing": shares, "bytes_per_second_of_the_disk": disk / took,
                }  # fmt: skip
                if (engine, workers) == ("ray", 2):
                    steady = sorted(times, key=sum)[:-1]
                    rows.append(
                        {"who": "extrapolation", "method": method, **extrapolated(steady, size, max(map(sum, times)))}
                    )
                rows.append(row)
                print(row, flush=True)
                shutil.rmtree(out)
                shutil.rmtree(cache)
    result = {"hardware": hardware(), "profile": profile, "adapters": count, "bytes": size, "copying_seconds": disk}
    path = RESULTS / f"migrate-{profile}.json"
    path.write_text(json.dumps(result | {"results": rows}, indent=1) + "\n")
    print(f"written: {path}")
    if profile == "full":
        draw(rows)


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw files a second by number of workers."""
    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=120, layout="constrained")
    for method, color in (("copy", "C0"), ("project", "C1")):
        for engine, style in (("local", "-o"), ("ray", "--s")):
            mine = [row for row in rows if row["who"] == engine and row["method"] == method]
            x, y = [row["workers"] for row in mine], [row["files_per_second"] for row in mine]
            axes.plot(x, y, style, color=color, label=f"{method}, {engine}")
    axes.set(xlabel="workers (2 cores)", ylabel="adapters a second, all included", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
