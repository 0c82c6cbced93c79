"""Ends a process with SIGKILL at its n-th step on the disk, for every n: the points are counted, not guessed.

A step is a file that is opened to write, each write (which ends half done), fsync, rename, link, removal, a new
folder, and a change of times. `python -m reliability.faults N inspect x.safetensors` runs the command line and ends it
at step N; with N = 0 it runs to its end and says how many steps it had.
"""

import builtins
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

# What the interpreter tells of before it does it. Files that are opened are counted where they are written to.
EVENTS = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate", "os.utime"}


class Steps:
    """Counts the steps of this process, and ends it at one of them. It cannot be taken out again: fork first.

    Args:
        last: The step at which to end; 0 only counts.
    """

    def __init__(self, last: int) -> None:
        self.last, self.count = last, 0
        self.open: Callable[..., Any] = io.open
        sys.addaudithook(self._told)
        io.open = builtins.open = self._opened  # type: ignore[assignment]
        fsync = os.fsync

        def synced(handle: Any) -> None:
            self.step()
            fsync(handle)

        os.fsync = synced

    def is_due(self) -> bool:
        """Count a step; return whether it is the last."""
        self.count += 1
        return self.count == self.last

    def step(self) -> None:
        """Count a step, and end the process if it is the last."""
        if self.is_due():
            os.kill(os.getpid(), signal.SIGKILL)

    def _told(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:
            self.step()

    def _opened(self, file: Any, mode: str = "r", *words: Any, **options: Any) -> Any:
        if not set(mode) & set("wxa") or "+" in mode:
            return self.open(file, mode, *words, **options)
        self.step()
        names = ("buffering", "encoding", "errors", "newline", "closefd", "opener")
        options |= dict(zip(names, words, strict=False))
        raw = _Written(self, file, mode.strip("bt"), options.get("closefd", True), options.get("opener"))
        buffered = io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, **{name: options[name] for name in names[1:4] if name in options})


class _Written(io.FileIO):
    """A file whose last write ends half done."""

    def __init__(self, steps: Steps, *words: Any) -> None:
        super().__init__(*words)
        self._steps = steps

    def write(self, content: Any) -> int:
        """Write, or write half and end."""
        if self._steps.is_due():
            super().write(memoryview(content)[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(content)


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a fork of this process; return its exit status, `-9` if it was killed."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # the threads of the parent are not in a fork; to wait for them is to hang
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(work: Callable[[], None]) -> Iterator[int]:
    """Run `work` again and again, ended at its first step, its second, ..., until it comes to its end.

    Yields:
        The number of the step, after each kill.

    Raises:
        RuntimeError: `work` ended by itself with an error.
    """
    step = 0
    while True:
        step += 1

        def ended(step: int = step) -> None:
            Steps(step)
            work()

        status = in_child(ended)
        if status == 0:
            return
        if status != -signal.SIGKILL:
            raise RuntimeError(f"step {step}: the work failed with status {status}")
        yield step


if __name__ == "__main__":
    from lorax.cli import main

    steps, sys.argv = Steps(int(sys.argv[1])), ["lorax", *sys.argv[2:]]
    try:
        main()
    finally:
        print(f"{steps.count} steps", file=sys.stderr)
