"""How much change the pairing of blocks stands, in order and by arg-max per module, on a pruned base of known pairs.

python -m benchmarks.matching    writes benchmarks/results/matching.json and docs/images/matching.png
"""

import json
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt

from demo.pruned import accuracy, pruned_pair
from lorax.compare.matching import match_bases

from .__main__ import RESULTS, hardware

CHANGES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24)
SEEDS = (0, 1, 2)
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "matching.png"


def main() -> None:
    """Measure, write and draw."""
    rows: list[dict[str, float | str]] = []
    for change in CHANGES:
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                source, target, truth = pruned_pair(Path(folder), change, seed=seed)
                for matching in ("order", "argmax"):
                    start = time.perf_counter()
                    found = accuracy(match_bases(source, target, matching), source, target, truth)
                    seconds = round(time.perf_counter() - start, 2)
                    rows.append(
                        {"change": change, "seed": seed, "matching": matching, "accuracy": found, "seconds": seconds}
                    )
                    print(rows[-1], flush=True)
    (RESULTS / "matching.json").write_text(json.dumps({"hardware": hardware(), "results": rows}, indent=1) + "\n")
    draw(rows)


def draw(rows: list[dict[str, float | str]]) -> None:
    """Draw both curves, mean and range over the seeds."""
    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=120, layout="constrained")
    for matching, label, style in (("order", "blocks in order (ours)", "-o"), ("argmax", "arg-max per module", "--s")):
        values = [
            [float(row["accuracy"]) for row in rows if (row["matching"], row["change"]) == (matching, change)]
            for change in CHANGES
        ]
        (line,) = axes.plot(CHANGES, [sum(v) / len(v) for v in values], style, label=label, markersize=4)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(CHANGES, low, high, alpha=0.2, color=line.get_color())
    axes.set_xlabel("noise added to every weight of the target, in norms of the weight")
    axes.set_ylabel("attention layers paired rightly")
    axes.set_ylim(0, 1.05)
    axes.set_title("SDXL to SSD-1B with 36 of 70 blocks taken out (width 1/20), 3 seeds", fontsize=9)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
