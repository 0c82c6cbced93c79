"""What the documents say of the code: limits, and where each module stands."""

import ast
import builtins
import importlib
import re
from pathlib import Path

import pytest

from lorax import errors
from lorax.options import LORA_RANK, RANK

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


def raised(function):
    """The errors of ours that a function raises itself, `raise FormatError(...)`, and does not catch."""
    nodes = list(function.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            yield from {node.exc.func.id} & vars(errors).keys()
        elif isinstance(node, ast.Try) and node.handlers:
            nodes += [*node.handlers, *node.orelse, *node.finalbody]
        elif not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            nodes += ast.iter_child_nodes(node)


# The docstring of a command is its help.
@pytest.mark.parametrize(
    "module", [path for path in MODULES if path.parts[0] == "lorax" and path.stem != "cli"], ids=str
)
def test_docstrings_name_the_errors_that_are_raised(module):
    """A public function names those that it raises itself; none names one that does not exist."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        text = ast.get_docstring(function) or ""
        section = text.partition("\nRaises:\n")[2].partition("\n\n")[0]
        named = set(re.findall(r"^    (\w+): ", section, re.MULTILINE))
        assert named <= vars(errors).keys() | vars(builtins).keys(), function.name
        if text and not function.name.startswith("_") and not text.startswith("See the base"):
            assert set(raised(function)) <= named, function.name


def test_the_defaults_that_the_documents_name_are_those_of_the_code():
    readme, method = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/method.md"))
    assert f"attach(unet, rank={RANK})" in readme
    assert f"at rank {RANK}" in method
    assert f"dense at rank {LORA_RANK}" in readme
