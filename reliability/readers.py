"""What reads files, each called on one file that may be anything; and what a call cost."""

import json
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.memory import peak
from lorax import (
    Base,
    Cache,
    Engine,
    LoraxError,
    TransferOptions,
    compare_bases,
    convert_to_lora,
    convert_to_lora_x,
    load_adapter,
    load_assignment,
    open_base,
    save_adapter,
    transfer_adapter,
)
from lorax.inspect import describe
from lorax.options import Format, Method
from lorax.train.state import random_state, set_random_state

from . import seeds

# One file may take no longer, in seconds of the processor: a machine that does other work besides is no hang.
SECONDS = 1.0
# What reading a small file may add to the memory of the process, beyond the size of the file.
MEMORY_BYTES = 256 * 2**20
NAMINGS = ("keep", "kohya", "diffusers", "original")


@dataclass(slots=True)
class Tally:
    """What a campaign found.

    Attributes:
        files: How many files were read.
        results: How many gave a result at least once.
        errors: How many calls ended in each class of `LoraxError`.
        unexpected: Every other exception, where it came from -> how often.
        slowest: Seconds of the processor that the slowest call took.
        memory: The most bytes that a call added to the resident memory of the process.
    """

    files: int = 0
    results: int = 0
    errors: dict[str, int] = field(default_factory=dict[str, int])
    unexpected: dict[str, int] = field(default_factory=dict[str, int])
    slowest: float = 0.0
    memory: int = 0

    def call(self, work: Callable[[], object]) -> bool:
        """Call one reader and keep what it did; return whether it gave a result."""
        before, start = _peak_from_now(), time.process_time()
        try:
            work()
            return True
        except LoraxError as error:
            name = type(error).__name__
            if not (str(error).isprintable() and error.what and error.fix):
                name = f"{name}, not clear"
                self.unexpected[name] = self.unexpected.get(name, 0) + 1
            self.errors[name] = self.errors.get(name, 0) + 1
        except Exception as error:
            places = [frame for frame in traceback.extract_tb(error.__traceback__) if "/lorax/" in frame.filename]
            place = f"{Path(places[-1].filename).name}:{places[-1].lineno}" if places else "?"
            text = f"{type(error).__name__} in {place}: {str(error)[:120]}"
            self.unexpected[text] = self.unexpected.get(text, 0) + 1
        finally:
            self.slowest = max(self.slowest, time.process_time() - start)
            self.memory = max(self.memory, peak() - before)
        return False

    def check(self, content: int = 0) -> None:
        """Assert that nothing but results and clear errors came, soon and within the memory.

        Args:
            content: Size of the largest file.
        """
        assert not self.unexpected, json.dumps(self.unexpected, indent=1)
        assert self.slowest < SECONDS
        assert self.memory < MEMORY_BYTES + content


def _peak_from_now() -> int:
    """Set the peak of the resident memory back, where the system can (Linux); return the memory now, in bytes."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def read_adapter(tally: Tally, path: Path, source: Base, target: Base, choice: int) -> None:
    """Do with an adapter file all that the product does: inspect, load, transfer, convert, save."""
    tally.files += 1
    method, naming = list(Method)[choice % len(Method)], NAMINGS[choice % len(NAMINGS)]
    form = list(Format)[choice // 7 % 2]
    engine = Engine(cache=Cache(path.parent / "cache", 2**24)) if choice % 5 == 0 else Engine()

    def moved() -> None:
        adapter = load_adapter(path, source if choice % 2 else None)
        result, _ = transfer_adapter(
            adapter, source, target, TransferOptions(method=method, rank=8, format=form, lora_rank=4), engine=engine
        )
        save_adapter(result, path.with_name("moved"), naming=naming)

    def converted() -> None:
        adapter = load_adapter(path, source if choice % 3 else None)
        lora = convert_to_lora(adapter, source, rank=4, engine=engine)
        save_adapter(lora, path.with_name("lora"), naming=naming)
        convert_to_lora_x(adapter, source, rank=8, engine=engine)

    def read() -> None:
        adapter = load_adapter(path)
        save_adapter(adapter, path.with_name("again"), naming=naming)

    calls = (lambda: describe(path), lambda: load_adapter(path, source, strict=True), read, moved, converted)
    tally.results += any([tally.call(work) for work in calls])


def read_base(tally: Tally, path: Path, adapter: Path, other: Base, choice: int) -> None:
    """Do with a base file (or folder) all that the product does: inspect, open, compare, transfer from and to it."""
    tally.files += 1

    def compared() -> None:
        compare_bases(open_base(path), other, attention_only=bool(choice % 2), rank=None if choice % 3 else 4)

    def moved() -> None:
        pair = (open_base(path), other) if choice % 2 else (other, open_base(path))
        method = list(Method)[choice % len(Method)]
        result, _ = transfer_adapter(load_adapter(adapter, pair[0]), *pair, TransferOptions(method=method, rank=4))
        save_adapter(result, adapter.with_name("moved"), naming=NAMINGS[choice % len(NAMINGS)])

    calls = (lambda: describe(path), compared, moved)
    tally.results += any([tally.call(work) for work in calls])


def read_assignment(tally: Tally, path: Path, source: Base, target: Base) -> None:
    """Read a file as an assignment of blocks."""
    tally.files += 1
    tally.results += tally.call(lambda: load_assignment(path, source, target))


def read_training(tally: Tally, path: Path) -> None:
    """Go on with a training from a file; what it does to the global generators is undone."""
    tally.files += 1
    before, held = random_state(), seeds.training()
    tally.results += tally.call(lambda: held.load(path))
    set_random_state(before)
