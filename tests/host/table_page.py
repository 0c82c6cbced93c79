"""The page of the table: cells as text, the page written, and a page read again."""

import math
import re
from dataclasses import dataclass, field
from textwrap import fill

from table_cells import Cell
from table_kinds import KINDS
from table_text import BOUND, EMPTY, GROUPS, INTRODUCTION, NOTES, STEPS, STOCK

COLUMNS = {name: label for columns in GROUPS.values() for name, label in columns.items()}


@dataclass
class Results:
    """All that was measured: model -> kind -> cell; a model that the host does not know is None."""

    version: str
    models: dict[str, dict[str, Cell] | None] = field(default_factory=dict)

    def cell(self, kind, column):
        """Return the text of a cell."""
        cells = self.models.get(column)
        if cells is None:
            return "(a)"
        if kind.label not in cells:
            return {"conv": "(b)", "vector": "(c)"}[kind.on]
        cell = cells[kind.label]
        steps = {"r": cell.read, "t": cell.moved, "w": cell.written, "a": cell.applied}
        marks = [mark for mark, value in steps.items() if value < BOUND]
        return " ".join([*marks, _number(cell.applied)])

    def stock(self, column):
        """Return whether the host's own loader reads all of our files of a model."""
        cells = self.models.get(column)
        if cells is None:
            return "(a)"
        left = [label for label, cell in cells.items() if not cell.stock]
        return f"not {', '.join(left)}" if left else "all"

    def texts(self):
        """Return every cell: (row, column) -> text."""
        cells = {(kind.label, column): self.cell(kind, column) for kind in KINDS for column in COLUMNS}
        return cells | {(STOCK, column): self.stock(column) for column in COLUMNS}

    def worst(self, kind):
        """Return the largest difference of each step over all models, in the order of the steps."""
        cells = [cells[kind.label] for cells in self.models.values() if cells and kind.label in cells]
        steps = [[getattr(cell, step) for cell in cells] for step in ("read", "moved", "written", "applied")]
        return [max(values, key=lambda value: math.inf if math.isnan(value) else value) for values in steps]


def render(results):
    """Return the page."""
    texts, notes = results.texts(), {label: f"[^{number}]" for number, label in enumerate(NOTES, 1)}
    lines = [INTRODUCTION.format(version=results.version, bound=_number(BOUND))]
    for title, columns in GROUPS.items():
        lines += [f"## {title}", "", *_head("adapter", *columns.values())]
        for row in (*(kind.label for kind in KINDS), STOCK):
            lines.append(_line([row + notes.get(row, ""), *(texts[row, column] for column in columns)]))
        lines.append("")
    lines += ["Empty cells:", "", *(f"- {mark}: {why}" for mark, why in EMPTY.items() if mark in texts.values()), ""]
    lines += ["## Each step by itself", "", STEPS, *_head("adapter", "read", "transferred", "written", "applied")]
    lines += [_line([kind.label, *map(_number, results.worst(kind))]) for kind in KINDS]
    for label, text in NOTES.items():
        lines += ["", fill(f"{notes[label]}: {text}", 120, subsequent_indent="    ")]
    return "\n".join([*lines, ""])


def parse(page):
    """Return the cells of a page: (row, column) -> text."""
    found = {}
    for title, columns in GROUPS.items():
        _, _, section = page.partition(f"## {title}\n")
        rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]
        assert cells[0] == ["adapter", *columns.values()], title
        for row, *texts in cells[2:]:
            found |= {(re.sub(r"\[\^\d\]", "", row), column): text for column, text in zip(columns, texts, strict=True)}
    return found


def marks_of(text):
    """Return a cell without its figure."""
    return re.sub(r" \de-?\d+$", "", text)


def figure_of(text):
    """Return the figure of a cell; None if it has none."""
    found = re.search(r" (\de-?\d+|nan)$", text)
    return float(found[1]) if found else None


def _number(value):
    return re.sub(r"e-0", "e-", f"{value:.0e}") if value else "0"


def _head(*cells):
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells):
    return f"| {' | '.join(cells)} |"
