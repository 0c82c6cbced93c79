"""Files below a folder: nothing that a pattern can mean is left out in silence, however deep it lies."""

import os
import stat
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePath

# What Windows calls a junction, a link to a folder (winnt.h).
IO_REPARSE_TAG_MOUNT_POINT = 0xA0000003


def find(folder: Path, pattern: str) -> tuple[list[Path], list[Path]]:
    """Return what a pattern finds below a folder.

    The pattern is that of `Path.glob`: `*`, `?` and `[...]` within a name, `**` for any number of folders, which does
    not go through links. A name with `[` is itself where it is there, else a pattern.

    Args:
        folder: Where to look.
        pattern: Relative, without `..`.

    Returns:
        All but folders that the pattern names (links to nothing, too); and the folders below which it could name
        more: those that cannot be read, and links to folders elsewhere. Both are sorted.

    Raises:
        ValueError: `**` is a part of a name.
    """
    parts = PurePath(pattern).parts
    if any("**" in part and part != "**" for part in parts):
        raise ValueError(f"{pattern}: ** stands for whole folders")
    root = os.path.realpath(folder)
    found: list[Path] = []
    unread: list[Path] = []
    open_folders = [(folder, _ahead({0}, parts))]
    while open_folders:  # and no recursion: folders may lie deeper than Python calls
        place, at = open_folders.pop()
        try:
            names = set(os.listdir(place))
        except OSError:
            unread.append(place)
            continue
        for name in names:
            path = place / name
            named = {i + 1 for i in at if i < len(parts) and parts[i] != "**" and _means(parts[i], name, names)}
            below = {i for i in at if i < len(parts) and parts[i] == "**"}
            if not os.path.isdir(path):
                if len(parts) in _ahead(named | below, parts):
                    found.append(path)
                continue
            on = _ahead(named if is_link(path) else named | below, parts) - {len(parts)}
            if on:
                open_folders.append((path, on))
            elif below and not Path(os.path.realpath(path)).is_relative_to(root):
                unread.append(path)
    return sorted(found), sorted(unread)


def is_link(path: Path) -> bool:
    """Whether a path is a link, or one of Windows' junctions."""
    try:
        state = os.lstat(path)
    except OSError:  # it has vanished
        return False
    return stat.S_ISLNK(state.st_mode) or getattr(state, "st_reparse_tag", 0) == IO_REPARSE_TAG_MOUNT_POINT


def _ahead(at: set[int], parts: Sequence[str]) -> set[int]:
    """Return the places in a pattern that are reached from some of them: `**` may stand for no folder."""
    reached = set(at)
    for i in sorted(at):
        while i < len(parts) and parts[i] == "**":
            i += 1
            reached.add(i)
    return reached


def _means(part: str, name: str, names: set[str]) -> bool:
    return name == part if part in names and not set("*?") & set(part) else fnmatch(name, part)
