"""A migration on Ray: scheduling, retries, transport and the sharing of subspaces are Ray's.

The files (bases, adapters, the output folder) lie where every machine of the cluster sees them under the same path.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError

from ..base import Base
from ..cache import open_cache
from ..engine import Engine, packed, unpacked
from ..errors import printable
from ..linalg import Subspace
from .job import Task
from .work import Record, move, opened

# Tasks handed to Ray at a time, for each core: enough that none waits, and the queue stays short.
AHEAD = 3


@dataclass(frozen=True, slots=True)
class _SharedEngine(Engine):
    """An engine whose subspaces are Ray tasks, each done once in the cluster and shared through the object store."""

    directory: Any = None
    paths: tuple[tuple[int, str], ...] = ()

    def _subspace(self, base: Base, name: str, rank: int, accuracy: str) -> Subspace:
        path = dict(self.paths)[id(base)]
        (reference,) = ray.get(self.directory.subspace.remote(path, name, rank, accuracy))
        found: Any = ray.get(reference)
        return unpacked(memoryview(found), self.device)


class _Directory:
    """Knows the Ray task of every subspace that was asked for; the results stay in the object store."""

    def __init__(self, device: str, cached: bool, gpu_share: float) -> None:
        self._words = device, cached
        self._task: Any = ray.remote(_subspace).options(num_cpus=1, num_gpus=gpu_share)
        self._found: dict[tuple[str, str, int, str], Any] = {}

    def subspace(self, *key: Any) -> Any:
        if key not in self._found:
            self._found[key] = self._task.remote(*key, *self._words)
        return [self._found[key]]


def _subspace(path: str, name: str, rank: int, accuracy: str, device: str, cached: bool) -> Any:
    torch.set_num_threads(1)
    engine = Engine(device, accuracy == "fast", open_cache() if cached else None)
    space = (engine.subspace if accuracy == "fast" else engine.triplets)(opened(path), name, rank)
    return np.frombuffer(packed(space), np.uint8)


def _move(task: Task, folder: str, previous: Record | None, device: str, cached: bool, directory: Any) -> Record:
    torch.set_num_threads(1)
    cache = open_cache() if cached else None

    def engine(source: Base, target: Base) -> Engine:
        paths = (id(source), task.source), (id(target), task.target)
        return _SharedEngine(device, task.options.fast, cache, directory, paths)

    return move(task, folder, previous, engine)


def run_ray(
    tasks: Sequence[Task],
    folder: Path,
    previous: Mapping[str, Record],
    workers: int | None,
    engine: Engine,
    gpu_share: float,
) -> Iterator[Record]:
    """Yield the record of every task as it comes.

    Runs on the cluster that `RAY_ADDRESS` names, else on one that is made for the job.

    Args:
        tasks: What to do.
        folder: The output folder.
        previous: What an earlier migration wrote, by output.
        workers: Cores of a cluster that is made for the job; None takes all.
        engine: How and where to compute; each process opens the cache of its machine if it has one.
        gpu_share: The share of a GPU that a task takes.
    """
    ours = not ray.is_initialized()
    if ours:
        cores = None if "RAY_ADDRESS" in os.environ else workers
        ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        device, cached = engine.device, engine.cache is not None
        directory = ray.remote(_Directory).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        shared = directory.remote(device, cached, gpu_share)
        work: Any = ray.remote(_move).options(num_cpus=1, num_gpus=gpu_share, max_retries=3)
        waiting = list(tasks)
        running: dict[Any, Task] = {}
        limit = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting or running:
            while waiting and len(running) < limit:
                task = waiting.pop(0)
                words = task, str(folder.resolve()), previous.get(task.output), device, cached, shared
                running[work.remote(*words)] = task
            for done in ray.wait(list(running), num_returns=1)[0]:
                task = running.pop(done)
                try:
                    record = ray.get(done)
                except RayError as error:
                    first = str(error).strip().splitlines()[0]
                    record = Record(task.name, task.output, "failed", f"its process died: {printable(first)}")
                yield record
    finally:
        if ours:
            ray.shutdown()
