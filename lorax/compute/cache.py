"""Results on disk, so that no layer is decomposed twice: bytes by key, checked when read, the oldest out when full.

An entry is a file: four bytes of CRC-32, then the content. It is written beside and renamed, so several processes may
use one cache, and one that is killed leaves at most a temporary file. What cannot be written is not kept, what is
damaged is computed again; either is said once, by `logging`. Nothing here needs torch.
"""

import hashlib
import logging
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import FileError, LoraxError, OptionError, OutputError, printable
from ..files.longpath import on_disk
from ..files.output import write_bytes
from ..files.tensorfile import open_file

LIMIT_GB = 10.0
# A full cache is emptied to this share of its limit, so that it is not looked through at every entry.
KEPT = 0.9
# How much is written before the whole cache is measured again: other processes write to it too.
MEASURED_EVERY = 256 * 2**20
# A temporary file that is older was left by a process that is gone.
STALE_SECONDS = 3600

KINDS = ("subspaces", "scores", "digests")
ENTRY = re.compile("[0-9a-f]{64}")
# Temporary files, as this version and earlier ones name them.
LEFT = ".*.part"

log = logging.getLogger("lorax.compute.cache")


def open_cache() -> "Cache | None":
    """Return the user's cache; None where `LORAX_CACHE` is `off`, and, said by `logging`, where there is no home.

    Raises:
        OptionError: `LORAX_CACHE_GB` is no number above 0.
    """
    if is_off():
        return None
    try:
        folder = cache_folder()
    except OptionError as error:
        log.warning("cache: results are not kept: %s", error)
        return None
    return Cache(folder)


def is_off() -> bool:
    """Return whether the user wants no cache: `LORAX_CACHE` is `off`."""
    return os.environ.get("LORAX_CACHE") == "off"


def cache_folder() -> Path:
    """Return the folder of the cache: `LORAX_CACHE`, else `lorax` in the user's cache folder of the system.

    Raises:
        OptionError: It is off, or nothing says where the user's folders are.
    """
    if is_off():
        raise OptionError("the cache is off", "LORAX_CACHE=off", "let LORAX_CACHE name a folder, or unset it")
    try:
        if given := os.environ.get("LORAX_CACHE"):
            return Path(given)
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "lorax" / "cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "lorax"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorax"
    except RuntimeError as error:
        raise OptionError("no folder for the cache", "the user has no home", "let LORAX_CACHE name one") from error


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
            stored = _stored(path, self.limit)
            if stored is None:
                self._tell(f"damaged entry, computed again: {path}")
                path.unlink(missing_ok=True)
                return None
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell(f"{path}: {error.strerror}")
            return None
        with suppress(OSError):  # to be read it is enough that it may be read
            os.utime(path)
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
        except (OSError, LoraxError) as error:
            if not os.path.isfile(path):  # Windows replaces none that is read; it is the same result
                self._tell(f"results are not kept: {error}")

    def info(self) -> dict[str, dict[str, int]]:
        """Return for each kind of entry how many there are, and their size in bytes."""
        found: dict[str, dict[str, int]] = {}
        for path, state in self._entries():
            kind = found.setdefault(path.parent.name, {"entries": 0, "bytes": 0})
            kind["entries"] += 1
            kind["bytes"] += state.st_size
        return found

    def verify(self) -> "Verified":
        """Read every entry, and remove the damaged ones.

        Raises:
            FileError: The folder cannot be read.
        """
        found = Verified()
        for path in self._files():
            if path.match(LEFT):
                continue
            try:
                if _is_sound(path, self.limit):
                    found.sound += 1
                    continue
                path.unlink()
                found.damaged.append(path)
            except FileNotFoundError:  # another process let go of it
                continue
            except OSError as error:
                found.left[path] = error.strerror or type(error).__name__
        return found

    def clear(self) -> int:
        """Remove every entry and what killed processes left; return how many files that were.

        Raises:
            FileError: The folder cannot be read.
            OutputError: Some cannot be removed; all others are.
        """
        count, left = 0, dict[Path, str]()
        for path in self._files():
            try:
                path.unlink()
                count += 1
            except FileNotFoundError:
                continue
            except OSError as error:
                left[path] = error.strerror or type(error).__name__
        self._size = -1
        for path, reason in left.items():
            got = f"{len(left)} of {len(left) + count}, such as {path}: {reason}"
            raise OutputError("entries of the cache cannot be removed", got, "change their permissions")
        return count

    def _path(self, kind: str, parts: tuple[object, ...]) -> Path:
        return on_disk(self.folder / kind / hashlib.sha256(repr(parts).encode()).hexdigest())

    def _files(self) -> Iterator[Path]:
        """Find our files only: whoever names a folder of their own as the cache loses nothing."""
        for kind in KINDS:
            folder = self.folder / kind
            try:
                names = sorted(os.listdir(on_disk(folder)))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise FileError("cannot read the cache", f"{folder}: {error.strerror}", "check LORAX_CACHE") from error
            yield from (on_disk(folder / name) for name in names if ENTRY.fullmatch(name) or fnmatchcase(name, LEFT))

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._files():
            try:
                state = path.stat()
            except FileNotFoundError:  # another process let go of it
                continue
            except OSError as error:
                raise FileError("cannot read the cache", f"{path}: {error.strerror}", "check LORAX_CACHE") from error
            if not path.match(LEFT):
                yield path, state

    def _make_room(self, size: int) -> None:
        self._unmeasured += size
        if self._size < 0 or self._size + size > self.limit or self._unmeasured > MEASURED_EVERY:
            entries = sorted(self._entries(), key=lambda entry: entry[1].st_mtime_ns)
            self._size, self._unmeasured = sum(state.st_size for _, state in entries), size
            full = self._size + size > self.limit
            for path, state in entries:
                if not full or self._size + size <= self.limit * KEPT:
                    break
                with suppress(PermissionError):  # Windows removes none that another process reads
                    path.unlink(missing_ok=True)
                    self._size -= state.st_size
            self._sweep()
        self._size += size

    def _sweep(self) -> None:
        for path in self._files():
            if path.match(LEFT):
                with suppress(FileNotFoundError, PermissionError):  # swept, or written, by another process
                    if time.time() - path.stat().st_mtime > STALE_SECONDS:
                        path.unlink()

    def _tell(self, what: str) -> None:
        if not self._told:
            log.warning("cache: %s", printable(what))
        self._told = True


@dataclass(slots=True)
class Verified:
    """What a look at every entry found.

    Attributes:
        sound: How many are sound.
        damaged: Those that were damaged and are removed.
        left: Those that could not be read or removed, each with the reason.
    """

    sound: int = 0
    damaged: list[Path] = field(default_factory=list[Path])
    left: dict[Path, str] = field(default_factory=dict[Path, str])


def _stored(path: Path, limit: int) -> memoryview | None:
    """Return what an entry holds, with its checksum; None where it is damaged.

    Raises:
        OSError: It cannot be read.
    """
    with open_file(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if not 4 <= size <= limit:  # more than may be written: a file of holes would fill the memory
            return None
        content = memoryview(bytearray(size))
        content = content[: handle.readinto(content)]
    return content if zlib.crc32(content[4:]) == int.from_bytes(content[:4], "little") else None


def _is_sound(path: Path, limit: int) -> bool:
    """Return whether an entry is undamaged, without holding it.

    Raises:
        OSError: It cannot be read.
    """
    with open_file(path) as handle:
        if not 4 <= os.fstat(handle.fileno()).st_size <= limit:
            return False
        told, found = int.from_bytes(handle.read(4), "little"), 0
        while part := handle.read(2**20):
            found = zlib.crc32(part, found)
    return told == found
