"""A library of adapters to migrate, and the command that does."""

import sys
from pathlib import Path

from lorax.migration.journal import JOURNAL

BROKEN = {"broken/cut.safetensors", "broken/text.safetensors", "broken/base.safetensors"}
COMMAND = [sys.executable, "-m", "lorax", "migrate"]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and JOURNAL not in path.name
    }


def words(library, bases, out, *more):
    given = [library, "--source", bases[0].files[0], "--target", bases[1].files[0], "-o", out]
    return [*COMMAND, *map(str, given), "--method", "project", "--rank", "20", "--workers", "2", *more]
