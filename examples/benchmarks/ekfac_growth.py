"""How the time of EK-FAC grows with the number of examples, their tokens, the width of the model and the queries.

    python examples/benchmarks/ekfac_growth.py [--quick] [--rival] [--repeats 3]

The model and the layers of ekfac.py (GPT-NeoX, all linear layers of the blocks). One size is doubled again and again
while the others stay; medians of the time of the fit and of pairwise scoring, and the exponent b of the curve a size^b
through them (least squares of logarithms). An exponent below 1 means that a part does not grow: for examples and
queries the eigendecompositions and one pass. `--rival` measures kronfluence beside it. With one thread the seconds are
those of the processor.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import warnings
from collections.abc import Sequence

import ekfac

SIZES = {
    "sequences": (16, 32, 64, 128),
    "length": (32, 64, 128, 256),
    "width": (64, 128, 256, 512),
    "queries": (4, 16, 64, 256),
}
BASE = {"sequences": 32, "length": 64, "width": 128, "queries": 8}
QUICK = {"sequences": (8, 16), "length": (16, 32), "width": (32, 64), "queries": (4, 8)}
QUICK_BASE = {"sequences": 8, "length": 16, "width": 32, "queries": 4}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, two of each")
    parser.add_argument("--rival", action="store_true", help="kronfluence too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8000)
    args = parser.parse_args(arguments)
    if args.quick:
        args.repeats, args.layers, args.vocabulary = 1, 2, 200
    if min(args.repeats, args.layers) < 1:
        parser.error("expected --repeats and --layers >= 1")
    return args


def measured(sizes: dict[str, int], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of fit and score, ours and kronfluence's."""
    own = ekfac.parse([f"--{name}={size}" for name, size in sizes.items()])
    own.layers, own.vocabulary = args.layers, args.vocabulary
    model, data, queries = ekfac.build(own)
    works = {"": ekfac.ours} | ({"rival_": ekfac.rival} if args.rival else {})
    times: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        for prefix, work in works.items():
            for part, seconds in work(model, data, queries, own).seconds.items():
                times.setdefault(prefix + part, []).append(seconds)
    return {part: statistics.median(values) for part, values in times.items()}


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log size.

    >>> exponent([1, 2, 4], [3.0, 12.0, 48.0])
    2.0
    """
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    return statistics.linear_regression(x, y).slope


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    warnings.filterwarnings("ignore")
    base, ladder = (QUICK_BASE, QUICK) if args.quick else (BASE, SIZES)
    print("fixed unless it grows:", ", ".join(f"{name} {size}" for name, size in base.items()), flush=True)
    measured(base, args)  # warm-up
    found: dict[str, dict[str, float]] = {}
    for name, sizes in ladder.items():
        rows = []
        for size in sizes:
            rows.append(measured({**base, name: size}, args))
            line = "  ".join(f"{part} {seconds:8.3f}" for part, seconds in rows[-1].items())
            print(f"{name:<10}{size:>5}   {line}", flush=True)
        found[name] = {part: round(exponent(sizes, [row[part] for row in rows]), 3) for part in rows[0]}
        print(
            f"{name:<10} ^ b   " + "  ".join(f"{part} {value:8.2f}" for part, value in found[name].items()), flush=True
        )
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
