"""Paths of more than 260 characters: Windows takes them in a form of their own only."""

import ntpath
import os
from pathlib import Path

WINDOWS = os.name == "nt"
# From here on no folder can be made; files have 12 characters more (Microsoft, "Maximum Path Length Limitation").
LONG = 260 - 12


def on_disk(path: str | os.PathLike[str], room: int = 0) -> Path:
    r"""Return a path as the system takes it: on Windows a long one begins with `\\?\`, any other stays as it is.

    Such a path is absolute and has no `.` and `..`, which Windows takes out by name too, before it looks at links.

    Args:
        path: A file or a folder, there or not.
        room: How many characters more the paths below it have that are made of what is returned.
    """
    if not WINDOWS:
        return Path(path)
    whole = ntpath.abspath(path)
    units = len(whole.encode("utf-16-le", "surrogatepass")) // 2
    if units + room < LONG or whole.startswith(("\\\\?\\", "\\\\.\\")):
        return Path(path)
    return Path("\\\\?\\UNC" + whole[1:] if whole.startswith("\\\\") else "\\\\?\\" + whole)
