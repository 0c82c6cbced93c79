"""What the tests keep to among themselves."""

import ast
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("test_*.py"))


def imported(tree):
    """Return the last part of the name of every module that is imported, and of what is taken from one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.rpartition(".")[2] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "").rpartition(".")[2], *(alias.name for alias in node.names))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_test_module_imports_another(path):
    """What two of them need has a module of its own: else a test runs twice, or goes with the one that it is not of."""
    modules = {file.stem for file in FILES}
    assert modules.isdisjoint(imported(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "line", ["from tests.test_tests import x", "from . import test_tests", "import tests.test_tests"]
)
def test_every_way_to_import_one_is_seen(line):
    assert "test_tests" in imported(ast.parse(line))
