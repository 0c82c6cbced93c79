"""A migration in a pool of processes on this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import torch

from ..compute.cache import open_cache
from ..compute.engine import Engine
from ..options import TransferOptions
from .job import Task
from .work import Record, move

# Threads of a process, for any number of processes: the last bits of a result depend on it.
ONE = 1
# What a process needs for itself and the comparison of two bases (measured: 1.9 GB for SDXL), and for each byte of an
# adapter: the file, its layers, the result and its bytes.
PROCESS_BYTES = 2 * 2**30
ADAPTER_COPIES = 5
# What a terminal sends to all processes of a command; Windows has no SIGHUP.
FROM_TERMINAL = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
# How often a process looks whether the one that started it is there, should the system not tell.
LOOK_SECONDS = 1.0


def fitting_workers(tasks: Sequence[Task], wanted: int | None) -> int:
    """Return how many processes to use: as many as asked for or as there are cores, within the memory that is free."""
    largest = max(map(_size, tasks), default=0)
    room = psutil.virtual_memory().available // (PROCESS_BYTES + ADAPTER_COPIES * largest)
    return max(1, min(wanted or os.cpu_count() or 1, int(room), len(tasks)))


def run_local(
    tasks: Sequence[Task], folder: Path, previous: Mapping[str, Record], workers: int, engine: Engine
) -> Generator[Record]:
    """Yield the record of every task as it comes.

    The largest adapter of each pair of bases goes first, so that the others find their subspaces in the cache. When a
    process dies (killed, out of memory), the tasks that ran then are tried once more, each alone.

    Args:
        tasks: What to do.
        folder: The output folder.
        previous: What an earlier migration wrote, by output.
        workers: How many processes.
        engine: How and where to compute; each process opens the cache of the user if it has one.
    """
    work = partial(_work, folder=str(folder), device=engine.device, cached=engine.cache is not None)
    stages = _stages(tasks) if engine.cache is not None else [list(tasks)]
    while any(stages):
        suspects = yield from _in_pool(work, stages, previous, workers)
        for task in suspects:
            if (yield from _in_pool(work, [[task]], previous, 1)):
                yield Record(task.name, task.output, "failed", "its process died twice (out of memory?)")


def _stages(tasks: Sequence[Task]) -> list[list[Task]]:
    first = largest_of_each(tasks)
    return [first, [task for task in tasks if task not in first]]


def largest_of_each(tasks: Sequence[Task]) -> list[Task]:
    """Return the largest adapter of each pair of bases and options: it needs the most of what the others need too."""
    first: dict[tuple[str, str, TransferOptions], Task] = {}
    for task in sorted(tasks, key=_size, reverse=True):
        first.setdefault((task.source, task.target, task.options), task)
    return list(first.values())


def _size(task: Task) -> int:
    try:
        return os.stat(task.adapter).st_size
    except OSError:  # gone, or a link to nothing: the task itself will say so
        return 0


class _Pool(ProcessPoolExecutor):
    """Processes of this migration, which end with it."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers, multiprocessing.get_context("spawn"), _start)

    def kill(self) -> None:
        """End the processes, and no other that the program may have started."""
        for process in list((self._processes or {}).values()):
            process.kill()


def _in_pool(
    work: Callable[..., Record],
    stages: Sequence[list[Task]],
    previous: Mapping[str, Record],
    workers: int,
) -> Generator[Record, None, list[Task]]:
    """Do tasks, stage by stage, taking them out; return those that ran when a process died, if one did."""
    running: dict[Future[Record], Task] = {}
    with _Pool(workers) as pool:
        try:
            for waiting in stages:
                while waiting or running:
                    while waiting and len(running) < workers:
                        with _unheard():
                            future = pool.submit(work, waiting[0], previous.get(waiting[0].output))
                        running[future] = waiting.pop(0)
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        record = future.result()
                        del running[future]
                        yield record
        except BrokenProcessPool:
            return list(running.values())
        except BaseException:  # interrupted: what is half done is not worth waiting for
            pool.kill()
            raise
    return []


@contextmanager
def _unheard() -> Generator[None]:
    """Let what a terminal sends wait; a process that is started meanwhile never gets it, not even while it imports."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FROM_TERMINAL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start() -> None:
    torch.set_num_threads(ONE)
    for number in FROM_TERMINAL:  # the parent hears it too, and ends this process
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone, however that ended: nobody would take what it makes.

    The sentinel of `multiprocessing` tells at once; but a process that the parent forked holds it open.
    """
    parent = multiprocessing.parent_process()
    while parent and parent.is_alive() and os.getppid() == parent.pid:
        parent.join(LOOK_SECONDS)
    os._exit(1)


def _work(task: Task, previous: Record | None, folder: str, device: str, cached: bool) -> Record:
    engine = Engine(device, open_cache() if cached else None)
    return move(task, folder, previous, engine)
