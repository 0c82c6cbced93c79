"""The long campaigns: `python -m reliability mutations|soak`; figures as JSON in `reliability/results`."""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from lorax import Base, match_bases, open_base

from . import seeds
from .mutations import build, documents, mutated, parse
from .readers import Tally, read_adapter, read_assignment, read_base, read_training
from .soak import soak

RESULTS = Path(__file__).with_name("results")
# A campaign may take its time over large files.
UNCHECKED = (
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
    HealthCheck.filter_too_much,
)


def attack(
    tally: Tally,
    files: st.SearchStrategy[Any],
    path: Path,
    read: Callable[[Tally, Path, int], None],
    count: int,
    start: int,
) -> None:
    """Read `count` files that hypothesis draws, each written to `path`.

    Args:
        tally: What is found.
        files: Draws the bytes or the text of a file.
        path: Where each is written.
        read: Called with the tally, the path and a number that chooses among the options.
        count: How many files.
        start: Equal numbers give equal files.
    """

    @settings(deadline=None, max_examples=count, suppress_health_check=UNCHECKED, database=None)
    @seed(start)
    @given(content=files, choice=st.integers(0, 1000))
    def one(content: bytes | str, choice: int) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        read(tally, path, choice)

    one()


def mutations(count: int, start: int, folder: Path, tallies: dict[str, Tally] | None = None) -> dict[str, Tally]:
    """Read `count` mutated files of every kind; return what was found by kind.

    Args:
        count: Files of each kind of adapter, of checkpoint and of document.
        start: Equal numbers give equal files.
        folder: Where the files are written, one after the other.
        tallies: Filled while it runs, for whoever interrupts it.
    """
    found = {} if tallies is None else tallies
    source, target = (open_base(seeds.base_file(folder / f"{i}.safetensors", change=0.2 * i)) for i in range(2))
    adapters = seeds.adapters()
    (folder / "adapter").mkdir()
    for kind, content in adapters.items():
        tally = found[f"adapter: {kind}"] = Tally()
        path = folder / "adapter" / "a.safetensors"
        attack(tally, mutated(content), path, lambda t, p, c: read_adapter(t, p, source, target, c), count, start)
    for name, files, path, read in documents_of(folder, source, target, adapters["peft"]):
        tally = found[name] = Tally()
        attack(tally, files, path, read, count, start)
    return found


def documents_of(
    folder: Path, source: Base, target: Base, adapter: bytes
) -> list[tuple[str, st.SearchStrategy[Any], Path, Callable[[Tally, Path, int], None]]]:
    """Return what is attacked beside adapters: a name, what draws its files, where they lie, who reads them."""
    lora = folder / "lora.safetensors"
    lora.write_bytes(seeds.adapters()["lora"])
    (folder / "beside").mkdir()
    peft = folder / "beside" / "adapter_model.safetensors"  # of which PEFT keeps the configuration beside it
    _, tensors = parse(adapter)  # without what its metadata says of scales
    peft.write_bytes(build({}, tensors))
    whole = source.files[0].read_bytes()
    sharded = seeds.base_folder(folder / "sharded")
    part = sharded / "unet" / seeds.shard(2)
    step = folder / "whole-step"
    seeds.training().save(step)
    assignment = json.dumps(match_bases(source, target, matching="order").to_json())
    configuration = (
        '{"r": 2, "lora_alpha": 4, "use_rslora": false, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 8}}'
    )
    return [
        ("checkpoint, one file", mutated(whole), folder / "b.safetensors",
            lambda t, p, c: read_base(t, p, lora, target, c)),
        ("checkpoint, a shard of a folder", mutated(part.read_bytes()), part,
            lambda t, p, c: read_base(t, sharded, lora, target, c)),
        ("checkpoint of a training", mutated(step.read_bytes()), folder / "step", lambda t, p, c: read_training(t, p)),
        ("assignment", documents((assignment,)), folder / "pairs.json",
            lambda t, p, c: read_assignment(t, p, source, target)),
        ("adapter_config.json", documents((configuration,)), folder / "beside" / "adapter_config.json",
            lambda t, p, c: read_adapter(t, peft, source, target, c)),
    ]  # fmt: skip


def main() -> None:
    """Run a campaign and write its figures."""
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    parser.add_argument("campaign", choices=["mutations", "soak"])
    parser.add_argument("--count", type=int, default=600, help="files of each kind, or transfers")
    parser.add_argument("--seed", type=int, default=1)
    given_ = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if given_.campaign == "mutations":
            found = mutations(given_.count, given_.seed, Path(folder))
            figures = {
                "files": sum(tally.files for tally in found.values()),
                "unexpected": sum(sum(tally.unexpected.values()) for tally in found.values()),
                "slowest_seconds": max(tally.slowest for tally in found.values()),
                "most_memory_bytes": max(tally.memory for tally in found.values()),
                "kinds": {name: asdict(tally) for name, tally in found.items()},
            }
        else:
            figures = soak(given_.count, Path(folder))
    figures = {
        "campaign": given_.campaign,
        "seconds": round(time.monotonic() - started, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{given_.campaign}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({key: value for key, value in figures.items() if key != "kinds"}, indent=1))


if __name__ == "__main__":
    main()
