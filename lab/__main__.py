"""`python -m lab round STYLE SEED | cost | related | report`: what is missing (data, bases, judge) is made first."""

import argparse
import json

from . import RESULTS
from .data import STYLES


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("round", help="train, move and measure all adapters of a style, for each seed")
    one.add_argument("style", choices=STYLES[2:])
    one.add_argument("seeds", type=int, nargs="+")
    parts.add_parser("cost", help="time a source beside the target, as X-Adapter has it")
    parts.add_parser("related", help="compare two related models that others trained")
    parts.add_parser("report", help="write docs/results.md from what is stored")
    words = parser.parse_args()
    if words.part == "report":
        from .report import write

        write()
    elif words.part == "cost":
        from .experiments import cost

        (RESULTS / "cost.json").write_text(json.dumps(cost(), indent=1) + "\n")
    elif words.part == "related":
        from .related import measure

        (RESULTS / "related.json").write_text(json.dumps(measure(), indent=1) + "\n")
    else:
        from .experiments import run_round

        for seed in words.seeds:
            run_round(words.style, seed)


if __name__ == "__main__":
    main()
