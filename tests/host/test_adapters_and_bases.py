"""Every kind of adapter on every family of bases, through a real ComfyUI; docs/adapters-and-bases.md is the result.

`LORAX_WRITE_TABLE=1` writes the page; without it the test compares.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))

from table_cells import measure_host, measure_ours
from table_kinds import KINDS
from table_models import open_pair
from table_page import COLUMNS, Results, figure_of, marks_of, parse, render
from table_text import BOUND, EMPTY, STOCK

from lorax.models.families import families

PAGE = ROOT / "docs" / "adapters-and-bases.md"
WRITES = os.environ.get("LORAX_WRITE_TABLE") == "1"


def run(host, script, *arguments):
    """Run a script in the host's folder by the host's Python; return the JSON that it prints."""
    path, python = host
    command = [python, Path(__file__).with_name(script), *arguments]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results(real_host, tmp_path_factory):
    """Make the models, do our part of every cell, let the host do its part, and compare."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bases") / "models"
    made = run(real_host, "make_bases.py", folder)
    pairs = {name: open_pair(name, folder / name, names) for name, names in made["models"].items() if names}
    models = {name: measure_ours(pair) for name, pair in pairs.items()}
    log = run(real_host, "apply_bases.py", folder, ROOT)
    for name, pair in pairs.items():
        measure_host(pair, models[name], log[name])
    return Results(made["version"], models)


def test_every_family_has_a_column():
    assert {column.split()[0] for column in COLUMNS} == set(families())


@pytest.mark.parametrize("column", COLUMNS)
def test_each_kind_goes_all_the_way(results, column):
    cells = results.models.get(column)
    if cells is None:
        pytest.skip(f"ComfyUI {results.version} has no such model")
    for kind in KINDS:
        if cell := cells.get(kind.label):
            assert not cell.faults, kind.label
            for step in ("read", "moved", "written", "applied"):
                assert getattr(cell, step) < BOUND, f"{kind.label}: {step}"


def test_the_page_holds(results):
    if WRITES:
        PAGE.write_text(render(results), encoding="utf-8")
    written, now = parse(PAGE.read_text(encoding="utf-8")), results.texts()
    assert written.keys() == now.keys()
    # Another version of the host may know fewer models.
    known = [place for place in now if results.models.get(place[1])]
    assert {place: marks_of(now[place]) for place in known} == {place: marks_of(written[place]) for place in known}


def test_the_page_has_every_mark_or_a_reason_and_figures_within_the_bound():
    written = parse(PAGE.read_text(encoding="utf-8"))
    figures = [figure for text in written.values() if (figure := figure_of(text)) is not None]
    assert max(figures) < BOUND
    assert {marks_of(text) for (row, _), text in written.items() if row != STOCK} <= {"r t w a", *EMPTY}
    assert {text for (row, _), text in written.items() if row == STOCK} - {"(a)"} == {"all"}
