"""How and where to compute: weights, digests, subspaces, from the cache or anew; the CPU where a device fails."""

import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import printable
from ..files.tensorfile import parse_json
from ..linalg import Subspace, decompose, leading_subspace
from ..models.base import Base
from ..version import __version__
from .cache import Cache

# A new number where the same weight would give other subspaces or scores.
ENGINE = 1
# More readers than this gain nothing: the weights come from one disk.
READERS = 4
# What Linux tells of a processor: two of one model compute the same.
PROCESSOR = re.compile(r"^(?:vendor_id|model name|cpu family|model|stepping|CPU (?:implementer|part))\s*: .*\n", re.M)

Result = TypeVar("Result")
log = logging.getLogger("lorax.compute.engine")


@dataclass(frozen=True, slots=True)
class Engine:
    """How and where to compute.

    Attributes:
        device: Such as `cpu` or `cuda`.
        cache: Where results are kept from one time to the next; None keeps nothing.
    """

    device: str = "cpu"
    cache: Cache | None = None

    def weight(self, base: Base, name: str) -> Tensor:
        """Return `Base.weight` on the device."""
        return base.weight(name, self.device)

    def triplets(self, base: Base, name: str, rank: int) -> Subspace:
        """Return `lorax.linalg.decompose` of a layer of a base: the singular vectors themselves, exactly."""
        return self._subspace(base, name, rank, "exact")

    def subspace(self, base: Base, name: str, rank: int) -> Subspace:
        """Return `lorax.linalg.leading_subspace` of a layer of a base: about twice as fast, for projectors only."""
        return self._subspace(base, name, rank, "fast")

    @property
    def version(self) -> tuple[object, ...]:
        """What decides the last bits of a result, besides the weight: part of every key of the cache."""
        return ENGINE, torch.device(self.device).type, torch.get_num_threads(), machine(self.device)

    def digests(self, base: Base, names: Sequence[str]) -> list[str]:
        """Return `Base.digest` of some layers, several at a time."""
        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
            list(pool.map(base.digest, (name for name in names if name not in base.digests)))
        return [base.digest(name) for name in names]

    def weights(self, base: Base, names: Sequence[str]) -> Iterator[Tensor]:
        """Yield the weights of some layers; while one is worked on, the next is read."""
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(self.weight, base, name) for name in names[:1]]
            for name in names[1:]:
                weight = ahead.pop().result()
                ahead.append(reader.submit(self.weight, base, name))
                yield weight
            for last in ahead:
                yield last.result()

    @contextmanager
    def remembering(self, *bases: Base) -> Generator[None]:
        """Keep digests of layers by the state of the files, so that unchanged files are not read again."""
        if self.cache is None:
            yield
            return
        kept: list[tuple[Base, int]] = []
        for base in bases:
            if base.state:
                known = _known(self.cache.read("digests", __version__, base.state))
                base.digests.update(known)
                kept.append((base, len(known)))
        try:
            yield
        finally:
            for base, count in kept:
                if len(base.digests) > count:
                    self.cache.write(json.dumps(base.digests).encode(), "digests", __version__, base.state)

    def _subspace(self, base: Base, name: str, rank: int, accuracy: str) -> Subspace:
        if self.cache is None:
            return _COMPUTE[accuracy](self.weight(base, name), rank)
        key = (self.version, base.digest(name), rank)
        for good in dict.fromkeys(("exact", accuracy)):
            found = self.cache.read("subspaces", *key, good)
            if found is not None:
                with suppress(ValueError):  # an entry that another program wrote: computed again
                    return unpacked(found, self.device)
        space = _COMPUTE[accuracy](self.weight(base, name), rank)
        self.cache.write(packed(space), "subspaces", *key, accuracy)
        return space


@cache
def machine(device: str) -> str:
    """Return what decides the last bits of a computation here: the processor, the device, the libraries' build."""
    try:
        cpu = "".join(sorted(set(PROCESSOR.findall(Path("/proc/cpuinfo").read_text(errors="replace")))))
    except OSError:  # Windows and macOS tell it in these two
        cpu = platform.processor() + platform.version()
    named = getattr(getattr(torch, torch.device(device).type, None), "get_device_name", None)
    gpu = named(device) if named else ""
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith(("MKL_", "OPENBLAS_")))
    found = (torch.__version__, torch.__config__.show(), platform.machine(), cpu, gpu, settings)
    return hashlib.sha256(repr(found).encode()).hexdigest()


CPU = Engine()
"""Exact, on the CPU, nothing kept: the default."""

_COMPUTE = {"exact": decompose, "fast": leading_subspace}


def or_on_cpu(work: Callable[[Engine], Result], engine: Engine) -> Result:
    """Return `work(engine)`; where its device fails, full or otherwise, that of the CPU, said in one line by `logging`.

    Args:
        work: Computes something; may be called twice. Whatever else it raises than torch does for a device passes.
        engine: How and where to compute.
    """
    if torch.device(engine.device).type == "cpu":
        return work(engine)
    try:
        return work(engine)
    except (RuntimeError, TypeError) as error:  # NotImplementedError and torch's own are RuntimeErrors
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    log.warning("%s failed, the CPU does the work instead: %s", engine.device, printable(reason))
    return work(replace(engine, device="cpu"))


def packed(space: Subspace) -> bytes:
    """Return `m, r, n` as int32, then `U`, `S` and `Vh` in float32; in float16 a projected update would lose 4e-4."""
    sizes = torch.tensor([space.U.shape[0], space.rank, space.Vh.shape[1]], dtype=torch.int32)
    return b"".join(part.detach().cpu().numpy().tobytes() for part in (sizes, space.U, space.S, space.Vh))


def unpacked(content: memoryview, device: str) -> Subspace:
    """Return the subspace of which `packed` made these bytes.

    Raises:
        ValueError: It did not make them.
    """
    m, r, n = np.frombuffer(content, np.int32, 3).tolist() if len(content) >= 12 else (0, 0, 0)
    if min(m, r, n) < 0 or len(content) != 12 + 4 * (m * r + r + r * n):
        raise ValueError("not a subspace")
    parts = np.split(np.frombuffer(content, np.float32, offset=12), [m * r, m * r + r])
    # Copied to where torch puts its tensors: products with a vector round by the alignment of the data.
    U, S, Vh = (torch.tensor(part, device=device) for part in parts)
    return Subspace(U.view(m, r), S, Vh.view(r, n))


def _known(content: memoryview | None) -> dict[str, str]:
    """Return digests that were kept; none where the bytes are no such thing."""
    try:
        found = parse_json(bytes(content or b"{}"))
    except ValueError:
        return {}
    is_right = isinstance(found, dict) and all(
        isinstance(value, str) for value in cast("dict[str, Any]", found).values()
    )
    return cast("dict[str, str]", found) if is_right else {}
