"""`make bench`: transfers between full-size bases; writes `benchmarks/results/transfer-<profile>.json`.

Every measurement is a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
# Resident memory that a transfer may take, in GB.
LIMITS = {"sd1": 2.5, "sdxl": 2.5, "sdxl-ssd1b": 2.5}
# Who does what: ours without a cache, single precision, with an empty cache, with a full one; a loop of full SVDs.
RUNS = (
    ("ours", "copy"),
    ("ours", "orthogonal"),
    ("ours", "project"),
    ("ours", "subspace-null"),
    ("ours-fast", "project"),
    ("ours-filling", "copy"),
    ("ours-cached", "copy"),
    ("ours-cached", "orthogonal"),
    ("ours-filling", "project"),
    ("ours-cached", "project"),
    ("svd-loop", "project"),
)


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def run(*words: str) -> dict[str, Any]:
    """Run one measurement in its own process."""
    command = [sys.executable, "-m", "benchmarks.measure", *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", choices=["full", "smoke"], default="full")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--works", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    profile, device = (parsed := parser.parse_args()).profile, parsed.device
    results: list[dict[str, Any]] = []
    for work in parsed.works:
        with tempfile.TemporaryDirectory() as folder:
            channels = 320 if profile == "full" else 64
            print(f"{work}: making two bases and a LoRA of rank 16", flush=True)
            run("make", work, folder, str(channels))
            for who, method in RUNS:
                row = {"work": work, **run(who, folder, method, device)}
                if profile == "full" and device == "cpu":
                    row["peak_limit_gb"] = LIMITS[work]
                results.append(row)
                print(row, flush=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"transfer-{profile}-{device}.json"
    path.write_text(json.dumps({"hardware": hardware(), "profile": profile, "results": results}, indent=1) + "\n")
    print(f"written: {path}")
    over = [row for row in results if row["who"] != "svd-loop" and row["peak_gb"] > row.get("peak_limit_gb", 1e9)]
    if over:
        sys.exit(f"over the memory limit: {over}")


if __name__ == "__main__":
    main()
