"""`NewtonGreedy`: picks that are foreseen and proven in runs, beside one pass over the features for every pick.

    python examples/benchmarks/newton_greedy.py [--quick] [--sizes 20000x2064x1000 100000x512x1000] [--repeats 3]
        [--device cuda]

Features of unit length in 50 clusters, one of them that of the 32 targets, variances falling like 1 / i: float64, as
scores of targets and landmarks give them, and float16, as `InfluenceFunction.write_features` leaves them in a file.
Both ways run in turn in one process and have to make the same picks. With one thread the seconds are the processor's.
On a GPU both find the features there.
A pass for every pick is cut off after --plain-picks of them, whose mean times k is the estimate that the ratio is of.
The last line is machine-readable.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from devices import clock, runs_on
from torch import Tensor

from lightning_influence import Interactions, NewtonGreedy
from lightning_influence.selection import newton_greedy

BLOCK = 4096
RUN = newton_greedy.LONGEST


def write_features(path: Path, n: int, r: int, dtype: torch.dtype) -> Tensor:
    """The pool's in a file [n, r]; gives those of the targets [32, r]."""
    generator = torch.Generator().manual_seed(0)
    deviations = torch.arange(1, r + 1).rsqrt()
    centres = torch.randn(50, r, generator=generator)
    rows = np.lib.format.open_memmap(path, "w+", np.float16 if dtype == torch.float16 else np.float64, (n, r))
    for start in range(0, n, BLOCK):
        part = torch.randn(min(BLOCK, n - start), r, generator=generator)
        part += centres[torch.randint(50, (len(part),), generator=generator)]
        part *= deviations
        rows[start : start + BLOCK] = (part / part.norm(dim=1, keepdim=True)).to(dtype).numpy()
    rows.flush()
    goals = (torch.randn(32, r, generator=generator) + centres[0]) * deviations
    return (goals / goals.norm(dim=1, keepdim=True)).to(dtype)


def seconds(interactions: Interactions, picks: int, longest: int) -> tuple[float, tuple[Any, ...]]:
    newton_greedy.LONGEST = longest
    device = interactions.features.device
    begun = clock(device)
    selection = interactions.select(NewtonGreedy(0.1), picks)
    return clock(device) - begun, selection.ids


def measure(args: argparse.Namespace, n: int, r: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        goals = write_features(Path(folder) / "features.npy", n, r, dtype)
        features = torch.from_numpy(np.load(Path(folder) / "features.npy", mmap_mode="c"))
        interactions = Interactions.from_features(features.to(args.device), goals.to(args.device))
        fast, slow, once = [], [], []
        cut = min(args.plain_picks, k)
        for _ in range(args.repeats):
            own, picks = seconds(interactions, k, RUN)
            fast.append(own)
            once.append(seconds(interactions, 1, 1)[0])  # what is done once, whatever the number of picks
            plain, first = seconds(interactions, cut, 1)
            slow.append(once[-1] + (plain - once[-1]) / max(1, cut - 1) * (k - 1))
            assert first == picks[:cut], "expected the same picks"
    found = {"n": n, "r": r, "k": k, "dtype": str(dtype).removeprefix("torch."), "same_picks": True}
    ratios = [one / other for one, other in zip(slow, fast, strict=True)]
    times = {"seconds": statistics.median(fast), "a_pass_a_pick": statistics.median(slow)}
    line = {**found, **times, "once": statistics.median(once), "speedup": statistics.median(ratios), "ratios": ratios}
    print(
        f"{n} x {r}, {k} picks, {line['dtype']}, {args.device}: {line['seconds']:.1f} s, with a pass for every pick "
        f"{line['a_pass_a_pick']:.1f} s: {line['speedup']:.1f} x ({min(ratios):.1f} to {max(ratios):.1f}); of either "
        f"{line['once']:.1f} s for the first pick",
        flush=True,
    )
    return line


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", default=["20000x2064x1000", "100000x512x1000"], help="rows x columns x picks"
    )
    parser.add_argument("--plain-picks", type=int, default=60, help="of a pass for every pick")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=runs_on, default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="one small size, once")
    args = parser.parse_args(arguments)
    if args.quick:
        args.sizes, args.repeats = ["4000x300x200"], 1
    torch.set_num_threads(args.threads)
    sizes = [[int(part) for part in size.split("x")] for size in args.sizes]
    kinds = (torch.float64, torch.float16)
    lines = [measure(args, n, r, k, kind) for n, r, k in sizes for kind in kinds]
    result = {"sizes": lines, "same_picks": True, "threads": args.threads, "device": str(args.device)}
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
