"""What the documents say of the code: limits, and where each module stands."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMITED = ("files.tensorfile", "adapters.layer", "inspect", "files.picturefile", "compare.scores", "transfer.report")
UNITS = {"": 1, " kB": 2**10, " MB": 2**20}
LIMIT = re.compile(r"^\| (`[A-Z_]+`(?:, `[A-Z_]+`)*) \| ([^|]+) \|", re.MULTILINE)
LIMITS = [
    (name.strip("`"), value)
    for names, values in LIMIT.findall((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    for name, value in zip(names.split(", "), values.split(", "), strict=True)
]
MAP = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("```")[1]
MODULES = [
    path.relative_to(ROOT)
    for folder in ("lorax", "nodes")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
]


def number(text):
    base, power, unit = re.fullmatch(r"([\d,]+)(?:\^(\d+))?( [kM]B)?", text).groups()
    return int(base.replace(",", "")) ** int(power or 1) * UNITS[unit or ""]


@pytest.mark.parametrize(("name", "value"), LIMITS, ids=dict(LIMITS))
def test_the_limits_are_those_of_the_code(name, value):
    modules = [importlib.import_module(f"lorax.{module}") for module in LIMITED]
    held = {getattr(module, name) for module in modules if hasattr(module, name)}
    assert held == {number(value)}


def test_the_table_of_limits_is_read():
    rows = re.findall(r"^\| `[A-Z_]+`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(LIMITS) > len(rows) > 5


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_has_its_place_in_the_map(module):
    """By the name of its file, or in the lines of its folder."""
    place = f"{module.parent.as_posix()}/"
    lines = re.findall(rf"^{place}.*(?:\n .*)*", MAP, re.MULTILINE)
    suffix = r"\.py\b" if place == "lorax/" else r"\b"
    assert any(re.search(rf"(?<!\w){module.stem}{suffix}", line) for line in lines)
