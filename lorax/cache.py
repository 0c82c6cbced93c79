"""Results on disk, so that no layer is decomposed twice: bytes by key, checked when read, the oldest out when full.

An entry is a file: four bytes of CRC-32, then the content. It is written beside and renamed, so several processes may
use one cache, and one that is killed leaves at most a temporary file. What cannot be written is not kept, what is
damaged is computed again; either is said once, by `logging`. Nothing here needs torch.
"""

import hashlib
import logging
import os
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .errors import OptionError, OutputError, printable
from .output import write_bytes

LIMIT_GB = 10.0
# A full cache is emptied to this share of its limit, so that it is not looked through at every entry.
KEPT = 0.9
# How much is written before the whole cache is measured again: other processes write to it too.
MEASURED_EVERY = 256 * 2**20
# A temporary file that is older was left by a process that is gone.
STALE_SECONDS = 3600

log = logging.getLogger("lorax.cache")


def open_cache() -> "Cache | None":
    """Return the user's cache; None where `LORAX_CACHE` is `off`."""
    return None if os.environ.get("LORAX_CACHE") == "off" else Cache()


def cache_folder() -> Path:
    """Return the folder of the cache: `LORAX_CACHE`, else `lorax` in the user's cache folder of the system."""
    if given := os.environ.get("LORAX_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "lorax" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lorax"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorax"


def cache_limit() -> int:
    """Return the size limit of the cache in bytes: `LORAX_CACHE_GB`, else 10 GB.

    Raises:
        OptionError: `LORAX_CACHE_GB` is no number above 0.
    """
    given = os.environ.get("LORAX_CACHE_GB", str(LIMIT_GB))
    try:
        limit = float(given)
    except ValueError:
        limit = 0.0
    if not 0 < limit < 1e9:
        raise OptionError("the size of the cache is no number of GB", f"LORAX_CACHE_GB={given}", "give for example 10")
    return int(limit * 2**30)


@dataclass(slots=True)
class Cache:
    """A bounded store of results, shared by processes.

    Attributes:
        folder: Where it lies; it is made when the first entry is written.
        limit: The most bytes that it holds.
    """

    folder: Path = field(default_factory=cache_folder)
    limit: int = field(default_factory=cache_limit)
    _size: int = field(default=-1, init=False)
    _unmeasured: int = field(default=0, init=False)
    _told: bool = field(default=False, init=False)

    def read(self, kind: str, *parts: object) -> memoryview | None:
        """Return the content that was written under a key; None where there is none, or a damaged one."""
        path = self._path(kind, parts)
        try:
            stored = _stored(path)
            if not _sound(stored):
                self._tell(f"damaged entry, computed again: {path}")
                path.unlink(missing_ok=True)
                return None
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell(f"{path}: {error.strerror}")
            return None
        return stored[4:]

    def write(self, content: bytes, kind: str, *parts: object) -> None:
        """Keep a content under a key, and let go of the oldest entries where the cache is full."""
        path = self._path(kind, parts)
        if len(content) > self.limit * KEPT:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(len(content) + 4)
            write_bytes(path, zlib.crc32(content).to_bytes(4, "little") + content, durable=False)
        except (OSError, OutputError) as error:
            self._tell(f"results are not kept: {error}")

    def info(self) -> dict[str, dict[str, int]]:
        """Return for each kind of entry how many there are, and their size in bytes."""
        found: dict[str, dict[str, int]] = {}
        for path, state in self._entries():
            kind = found.setdefault(path.parent.name, {"entries": 0, "bytes": 0})
            kind["entries"] += 1
            kind["bytes"] += state.st_size
        return found

    def verify(self) -> tuple[int, list[Path]]:
        """Read every entry; return how many are sound, and those that were damaged and are removed."""
        sound, damaged = 0, list[Path]()
        for path, _ in self._entries():
            if _sound(_stored(path)):
                sound += 1
            else:
                path.unlink(missing_ok=True)
                damaged.append(path)
        return sound, damaged

    def clear(self) -> int:
        """Remove every entry and what killed processes left; return how many files that were."""
        count = 0
        for path in self._files():
            path.unlink(missing_ok=True)
            count += 1
        self._size = -1
        return count

    def _path(self, kind: str, parts: tuple[object, ...]) -> Path:
        return self.folder / kind / hashlib.sha256(repr(parts).encode()).hexdigest()

    def _files(self) -> Iterator[Path]:
        """Find our files only: whoever names a folder of their own as the cache loses nothing."""
        for kind in KINDS:
            for path in sorted((self.folder / kind).glob("*")):
                name = path.name.removeprefix(".").partition(".")[0]
                if len(name) == 64 and path.is_file():
                    yield path

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._files():
            if not path.name.startswith("."):
                try:
                    yield path, path.stat()
                except FileNotFoundError:  # another process let go of it
                    continue

    def _make_room(self, size: int) -> None:
        self._unmeasured += size
        if self._size < 0 or self._size + size > self.limit or self._unmeasured > MEASURED_EVERY:
            entries = sorted(self._entries(), key=lambda entry: entry[1].st_mtime_ns)
            self._size, self._unmeasured = sum(state.st_size for _, state in entries), size
            full = self._size + size > self.limit
            for path, state in entries:
                if not full or self._size + size <= self.limit * KEPT:
                    break
                path.unlink(missing_ok=True)
                self._size -= state.st_size
            self._sweep()
        self._size += size

    def _sweep(self) -> None:
        for path in self._files():
            if path.name.startswith(".") and time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)

    def _tell(self, what: str) -> None:
        if not self._told:
            log.warning("cache: %s", printable(what))
        self._told = True


KINDS = ("subspaces", "scores", "digests")


def _stored(path: Path) -> memoryview:
    with path.open("rb") as handle:
        content = bytearray(os.fstat(handle.fileno()).st_size)
        return memoryview(content)[: handle.readinto(content)]


def _sound(stored: memoryview) -> bool:
    return len(stored) >= 4 and zlib.crc32(stored[4:]) == int.from_bytes(stored[:4], "little")
