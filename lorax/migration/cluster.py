"""A migration on Ray: scheduling, retries, transport and the sharing of subspaces are Ray's.

The files (bases, adapters, the output folder) lie where every machine of the cluster sees them under the same path.
For each pair of bases one adapter, the largest, is planned: that tells which subspaces are needed, and how layers are
paired. The subspaces then are tasks, whose results all adapters share.
"""

import logging
import os
import signal
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError

from ..compare.matching import Assignment
from ..compute.cache import open_cache
from ..compute.engine import Engine, or_on_cpu, packed, unpacked
from ..errors import LoraxError
from ..linalg import Subspace
from ..models.base import Base
from ..options import TransferOptions
from ..transfer.plan import Piece
from ..transfer.run import needed_pieces
from .job import Task
from .local import ONE, largest_of_each
from .work import Record, move, opened, planned

# Tasks handed to Ray at a time, for each core: enough that none waits, and the queue stays short.
AHEAD = 3
# How often a task is tried again when its process or its machine is lost: Ray's own default.
RETRIES = 3
# A subspace: base file, layer, rank, whether it may be the fast one.
Part = tuple[str, str, int, bool]


@dataclass(frozen=True, slots=True)
class _Sharing(Engine):
    """An engine that takes subspaces from the object store, and computes those that are not there."""

    files: tuple[str, str] = ("", "")
    pieces: Mapping[Part, Any] = field(default_factory=dict[Part, Any])

    def _subspace(self, base: Base, name: str, rank: int, accuracy: str) -> Subspace:
        for file in self.files:
            if (
                opened(file) is base
                and (reference := self.pieces.get((file, name, rank, accuracy == "fast"))) is not None
            ):
                try:
                    found: Any = ray.get(reference)
                    return unpacked(memoryview(found), self.device)
                except RayError:  # what it could not compute is computed, or refused, here
                    break
        return Engine._subspace(self, base, name, rank, accuracy)


def _survey(task: Task, device: str, cached: bool) -> tuple[list[Part], Assignment | None]:
    """Return the subspaces that a task needs, and the pairs of layers with their scores."""
    torch.set_num_threads(ONE)

    def surveyed(engine: Engine) -> tuple[list[Piece], Assignment]:
        plan = planned(task, engine)
        return needed_pieces(plan, engine), replace(plan.assignment, scores=plan.scores)

    try:
        found, assignment = or_on_cpu(surveyed, Engine(device, open_cache() if cached else None))
    except LoraxError:  # it will be said when the task is done in earnest
        return [], None
    return [(task.target if p.of_target else task.source, p.layer, p.rank, p.fast) for p in found], assignment


def _subspace(piece: Part, device: str, cached: bool) -> Any:
    torch.set_num_threads(ONE)
    file, name, rank, fast = piece
    engine = Engine(device, open_cache() if cached else None)
    space = (engine.subspace if fast else engine.triplets)(opened(file), name, rank)
    return np.frombuffer(packed(space), np.uint8)


def _move(
    task: Task,
    folder: str,
    previous: Record | None,
    assignment: Assignment | None,
    pieces: Mapping[Part, Any],
    device: str,
    cached: bool,
) -> Record:
    torch.set_num_threads(ONE)
    cache = open_cache() if cached else None
    engine = _Sharing(device, cache, (task.source, task.target), pieces)
    return move(task, folder, previous, engine, assignment)


def run_ray(
    tasks: Sequence[Task],
    folder: Path,
    previous: Mapping[str, Record],
    workers: int | None,
    engine: Engine,
    gpu_share: float,
) -> Generator[Record]:
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
        heard = signal.getsignal(signal.SIGTERM)
        ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        if heard is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, heard)  # Ray takes it, for an end with a status of its own
    try:
        words = engine.device, engine.cache is not None
        survey, subspace, work = (_remote(function, gpu_share) for function in (_survey, _subspace, _move))
        assignments: dict[tuple[str, str, TransferOptions], Any] = {}
        pieces: dict[Part, Any] = {}
        for task, asked in {task: survey.remote(task, *words) for task in largest_of_each(tasks)}.items():
            needed, assignment = _result(asked) or ([], None)
            assignments[task.source, task.target, task.options] = ray.put(assignment)
            pieces |= {piece: subspace.remote(piece, *words) for piece in needed if piece not in pieces}
        if pieces:
            ray.wait(list(pieces.values()), num_returns=len(pieces))
        shared = ray.put(pieces)
        waiting = list(tasks)
        running: dict[Any, Task] = {}
        limit = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting or running:
            while waiting and len(running) < limit:
                task = waiting.pop(0)
                assignment = assignments[task.source, task.target, task.options]
                given = task, str(folder.resolve()), previous.get(task.output), assignment, shared
                running[work.remote(*given, *words)] = task
            for done in ray.wait(list(running), num_returns=1)[0]:
                task = running.pop(done)
                yield _result(done) or Record(task.name, task.output, "failed", "its process died again and again")
    finally:
        if ours:
            ray.shutdown()


def _remote(function: Any, gpu_share: float) -> Any:
    return ray.remote(function).options(num_cpus=1, num_gpus=gpu_share, max_retries=RETRIES)


def _result(reference: Any) -> Any:
    """Return the result of a task; None where Ray gave it up."""
    try:
        return ray.get(reference)
    except RayError:
        return None
