"""docs/results.md, made of the stored results: `python -m lab report`."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from . import HERE, RESULTS
from .experiments import CEILINGS, PAIRS, ceiling_of

DOCS = HERE.parent / "docs"
Row = dict[str, Any]
# Groups of layers that do less than this on their own source are left out: their shares are noise.
LEAST_GAIN = 1e-3
# arXiv 2501.16559: what its tables say, for the rows that ours stand beside.
PUBLISHED_2 = {
    "lora-x": "+3.7 %, 0.16 MB",
    "lora-x, rate 0.1": "",
    "lora-32": "-27.8 %, 34.07 MB",
    "lora-16": "-10.1 %",
    "lora-1": "-12.5 %",
}
PUBLISHED_3 = {"dora-16": "-9.1 and -10.7 % (r 8)", "foura-16": "-4.7 % (r 64)"}


class Results:
    """Every row of every round, with the measures of its own seed beside it.

    A row gains `closed`, the share of the gap between no adapter and the adapter trained on the target that is closed
    on the loss of held-out pictures; `style_change`, the change of the style score against the trained one; and
    `diversity_change`.
    """

    def __init__(self, folder: Path = RESULTS) -> None:
        rounds = [json.loads(path.read_text()) for path in sorted(folder.glob("*-[0-9]*.json"))]
        self.styles = sorted({found["style"] for found in rounds})
        self.seeds = {style: sum(found["style"] == style for found in rounds) for style in self.styles}
        self.rows = [row for found in rounds for row in _compared(found)]
        self.groups = [row | {"style": found["style"]} for found in rounds for row in found["groups"]]
        self.seconds = [found["seconds"] for found in rounds]

    def of(self, measure: str, **where: str) -> list[float]:
        """Return a measure of the rows where `on`, `kind`, `way` or `style` are as given."""
        found = [row for row in self.rows if all(row[key] == value for key, value in where.items())]
        return [row[measure] for row in found if not math.isnan(row.get(measure, math.nan))]

    def ways(self, **where: str) -> list[str]:
        """Return the ways that were measured, the best closed gap first."""
        found = {row["way"] for row in self.rows if all(row[key] == value for key, value in where.items())}
        return sorted(sorted(found), key=lambda way: -statistics.fmean(self.of("closed", way=way, **where) or [-9.0]))


def _compared(found: Row) -> list[Row]:
    rows = {(row["on"], row["kind"], row["way"]): row for row in found["rows"]}
    compared: list[Row] = []
    for (on, kind, _), row in rows.items():
        row = row | {"style_name": found["style"], "seed": found["seed"]}
        none, trained = rows[on, "", "no adapter"], rows.get((on, ceiling_of(kind), "trained"))
        if "loss" in row and trained is not None:
            row["closed"] = (none["loss"] - row["loss"]) / (none["loss"] - trained["loss"])
        if "style" in row and trained is not None:
            row["style_change"] = 100 * (row["style"] / trained["style"] - 1)
            row["diversity_change"] = 100 * (row["diversity"] / trained["diversity"] - 1)
        compared.append(row)
    return compared


def told(values: Sequence[float], form: str = ".3f") -> str:
    """Return mean and standard error."""
    if not values:
        return "-"
    mean = format(statistics.fmean(values), form)
    if len(values) < 2:
        return mean
    return f"{mean} ± {format(statistics.stdev(values) / len(values) ** 0.5, form.replace('+', ''))}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def ranks(values: Sequence[float]) -> list[float]:
    """Return the ranks, those of equal values averaged."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the rank correlation; NaN where it has none."""
    try:
        return statistics.correlation(ranks(a), ranks(b))
    except statistics.StatisticsError:
        return math.nan


def pairs_and_styles(results: Results, adapter: str) -> str:
    """Return the table in the shape of the published Table 1, for one kind of adapter."""
    rows: list[list[str]] = []
    for on in PAIRS:
        for style in results.styles:
            for way in (
                "trained",
                *(("orthogonal", "copy", "project") if on != "narrow" else ("streams", "align", "index")),
                "no adapter",
            ):
                kind = "" if way == "no adapter" else adapter
                of = _reader(results, on=on, kind=kind, way=way, style_name=style)
                change = [of("style_change", "+.1f"), of("diversity_change", "+.1f")] if kind else ["", ""]
                feature = of("feature") if way != "trained" else "1"
                rows.append(
                    [f"source to {on}", style, way, of("style"), *change, feature, of("prompt"), of("closed", ".2f")]
                )
    head = ["bases", "style", "moved by", "style score", "its change, %", "diversity's change, %", "feature similarity",
            "prompt", "gap closed"]  # fmt: skip
    return table(head, rows)


def _reader(results: Results, **where: str) -> Callable[..., str]:
    return lambda measure, form=".3f": told(results.of(measure, **where), form)


def kinds(results: Results, on: str, names: dict[str, str]) -> str:
    """Return the table in the shape of the published Tables 2 and 3."""
    rows: list[list[str]] = []
    for kind, published in names.items():
        for way in results.ways(on=on, kind=kind):
            if way == "trained" or not results.of("style", on=on, kind=kind, way=way):
                continue
            line = [kind, way]
            for style in results.styles:
                of = _reader(results, on=on, kind=kind, way=way, style_name=style)
                line += [of("style"), of("style_change", "+.1f"), of("closed", ".2f")]
            rows.append([*line, told(results.of("retained", on=on, kind=kind, way=way), ".2f"), published])
            published = ""
    measures = "style score", "against trained on the target, %", "gap closed"
    head = ["adapter", "moved by", *(f"{style}: {measure}" for style in results.styles for measure in measures)]
    return table([*head, "norm that arrived", "published, HPSv2"], rows)


def all_ways(results: Results, kind: str) -> str:
    """Return the closed gap of every way on every pair, the best of the fine-tune first."""
    order = [*results.ways(on="fine-tune", kind=kind)]
    order += [way for on in PAIRS[1:] for way in results.ways(on=on, kind=kind) if way not in order]
    columns = [(style, on) for style in results.styles for on in PAIRS]
    rows = [
        [
            way,
            *(told(results.of("closed", style_name=style, on=on, kind=kind, way=way), ".3f") for style, on in columns),
        ]
        for way in dict.fromkeys(order)
        if way != "trained"
    ]
    return table(["moved by", *(f"{style}, to {on}" for style, on in columns)], rows)


def closed(results: Results, kind: str, *ways: str) -> str:
    """Return the closed gap of some ways, by style and target of the source's size."""
    rows = [
        [
            style,
            way,
            *(told(results.of("closed", style_name=style, on=on, kind=kind, way=way), ".2f") for on in PAIRS[:-1]),
        ]
        for style in results.styles
        for way in ways
    ]
    return table([f"{kind}: style", "moved by", *(f"gap closed on {on}" for on in PAIRS[:-1])], rows)


def gains(results: Results, *styles: str) -> dict[str, list[float]]:
    """Return, for every way, what it closed more of the gap than copying, in each comparison of one seed."""
    keyed = {
        (r["on"], r["kind"], r["style_name"], r["seed"], r["way"]): r["closed"]
        for r in results.rows
        if "closed" in r and r["style_name"] in styles
    }
    found: dict[str, list[float]] = {}
    for key, value in keyed.items():
        if key[-1] not in ("copy", "trained", "no adapter") and (*key[:-1], "copy") in keyed:
            found.setdefault(key[-1], []).append(value - keyed[(*key[:-1], "copy")])
    return found


def better(values: Sequence[float]) -> str:
    """Return how many are above 0, and of how many."""
    return f"{sum(value > 0 for value in values)} of {len(values)}"


def against_copy(results: Results) -> str:
    """Return for every way in how many comparisons it was better than copying, and by how much."""
    found = sorted(gains(results, *results.styles).items(), key=lambda item: -statistics.fmean(item[1]))
    rows = [[way, better(values), told(values, "+.4f")] for way, values in found]
    return table(["moved by", "better than copy", "difference of the closed gap"], rows)


def losses(results: Results, style: str) -> str:
    """Return the losses of fine-tune and source on a style without any adapter, and of the source with one."""
    ways = (("source", ""), ("fine-tune", ""), ("source", "lora-16"))
    source, there, home = (
        statistics.fmean(results.of("loss", style_name=style, on=on, kind=kind)) for on, kind in ways
    )
    return f"{there:.3f}, where the source has {source:.3f}, and {home:.3f} with its LoRA"


def predictors(results: Results, path: Path) -> str:
    """Return what foretells the share of a layer group's gain that arrives, for each pair of bases; draw it."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True)
    rows: list[list[str]] = []
    names = {"similarity": "similarity", "corrected": "corrected similarity", "retained": "norm that arrived"}
    useful = [row for row in results.groups if row["gain_on_source"] > LEAST_GAIN]
    for axis, (measure, name) in zip(axes, names.items(), strict=True):
        for way, colour in (("copy", "#0072b2"), ("project", "#d55e00")):
            for on, sign in (("fine-tune", "o"), ("pruned", "^")):
                line = [f"source to {on}", way, name]
                for style, filled in zip(results.styles, (True, False), strict=True):
                    of = [r for r in useful if (r["way"], r["on"], r["style"]) == (way, on, style)]
                    x, y = [row[measure] for row in of], [row["gain"] / row["gain_on_source"] for row in of]
                    face = colour if filled else "none"
                    label = f"{way}, {on}, {style}"
                    axis.scatter(x, y, s=16, edgecolors=colour, facecolors=face, marker=sign, label=label, alpha=0.7)
                    correlation = spearman(x, y)
                    line.append("-" if math.isnan(correlation) else f"{correlation:+.2f} ({len(x)})")
                rows.append(line)
        axis.set_xlabel(name)
        axis.axhline(1, color="#999999", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("gain on the target / on the source")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="upper center", ncols=4)
    figure.tight_layout(rect=(0, 0, 1, 0.86))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return table(["bases", "moved by", "predictor", *results.styles], sorted(rows))


def related(found: Row) -> str:
    """Return what changed between two releases of a model, and where, by kind of layer."""
    rows = [
        [group["kind"], str(group["layers"]), f"{100 * group['moved']:.2f}"]
        + [f"{100 * group[share]:.0f}" for share in ("weight_inside", "change_inside", "chance")]
        for group in sorted(found["groups"], key=lambda group: -group["layers"])
        if group["layers"] > 2
    ]
    head = [
        "layers",
        "count",
        "changed by, %",
        "of the weight in its leading quarter, %",
        "of the change, %",
        "by chance, %",
    ]
    return table(head, rows)


def streams(results: Results) -> str:
    """Return what `streams` closed of the gap to another width, by adapter and style."""
    of = partial(results.of, "closed", on="narrow", way="streams")
    cases = [(kind, style) for kind in CEILINGS for style in results.styles]
    return ", ".join(f"{told(of(kind=kind, style_name=style), '.2f')} ({kind}, {style})" for kind, style in cases)


def nearest(results: Results, style: str) -> str:
    """Return the change of the style score where it is least: LoRA of rank 16 to `near`, by `orthogonal`."""
    where = {"style_name": style, "on": "near", "kind": "lora-16", "way": "orthogonal"}
    return told(results.of("style_change", **where), "+.0f")


def headline(results: Results, before: str) -> dict[str, str]:
    """Return what is said of every set of models, by the name that it has in the template."""
    found = {"SEEDS": ", ".join(f"{style}: {count}" for style, count in results.seeds.items())}
    for style in results.styles:
        found[f"BETTER_{style.upper()}"] = better(gains(results, style)["orthogonal"])
        found[f"NEAREST_{style.upper()}"] = nearest(results, style)
    found["WORST"] = f"{-min(gains(results, *results.styles)['orthogonal']):.3f}"
    ways = ("orthogonal", "copy", "copy, strength 0.75", "project")
    found["CLOSED"] = "\n".join(closed(results, kind, *ways) for kind in ("lora-16", "lora-x"))
    found["AGAINST_COPY"] = against_copy(results)
    return {before + name: value for name, value in found.items()}


def write() -> None:
    """Write docs/results.md and its pictures."""
    results, second = Results(), Results(RESULTS / "second")
    images = DOCS / "images"
    sheets: list[str] = []
    for path in sorted(RESULTS.glob("*.jpg")):
        style, _, on = path.stem.partition("-")
        sheets.append(
            f"**{style}, source to {on}**\n\n![LoRA-X of the style {style}, {on}](../lab/results/{path.name})\n"
        )
    cost = json.loads((RESULTS / "cost.json").read_text())
    beside, alone = cost["source beside it"], cost["target alone"]
    others = json.loads((RESULTS / "related.json").read_text())
    parts = {
        "HOURS": f"{sum(results.seconds) / 3600:.1f}",
        "TABLE_1": pairs_and_styles(results, "lora-x"),
        "TABLE_1_LORA": pairs_and_styles(results, "lora-16"),
        "TABLE_2": kinds(results, "fine-tune", PUBLISHED_2),
        "TABLE_3": kinds(results, "pruned", PUBLISHED_3 | {"lora-x": "", "lora-16": ""}),
        "TABLE_4": table(
            ["drawing 4 pictures", "seconds", "published (SSD-1B to SDXL)"],
            [
                ["target with a transferred adapter", f"{alone:.2f}", "LoRA-X 3.7 s"],
                [
                    "source beside the target at each step",
                    f"{beside:.2f} ({beside / alone:.1f} times)",
                    "X-Adapter 17.1 s (4.6 times)",
                ],
            ],
        ),
        "WAYS_LORA_X": all_ways(results, "lora-x"),
        "WAYS_LORA": all_ways(results, "lora-16"),
        **headline(results, ""),
        **headline(second, "SECOND_"),
        "SECOND_STREAMS": streams(second),
        **{f"LOSS_{style.upper()}": losses(results, style) for style in results.styles},
        "NAMESAKES": f"{others['most_similar_to_namesake']} of {others['layers']}",
        "PRUNED_RIGHT": f"{others['pruned_paired_right']} of {others['pruned_blocks']}",
        "RELATED": related(others),
        "PREDICTORS": predictors(results, images / "lab-predictors.png"),
        "SHEETS": "\n".join(sheets),
    }
    text = (HERE / "results.template.md").read_text()
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part.rstrip("\n"))
    (DOCS / "results.md").write_text(text)
