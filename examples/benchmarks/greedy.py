"""Exact greedy selection against plain Algorithm 1: time, the same picks, and memory.

    python examples/benchmarks/greedy.py [--quick] [--sizes 100000x4096x1000 270000x512x13500] [--plain-steps 20]

Each run is a process of its own that memory-maps float16 features. Two kinds of features, rows of unit length:

- spectrum: 50 clusters of unequal size around a common mean, variances falling like 1 / i, as gradients have;
- isotropic: independent normal numbers, where no direction leads and bounds can skip nothing.

b = F v for a random v of the features' own spectrum, scaled so that the k rows of the largest b, taken together, just
use up the gain along their sum. The rival is the library's own plain loop: one blocked float64 product F (M U) per
pick, same threads. With --quick both run whole, in turns. Otherwise the plain loop is timed and compared at a number of
picks spread over the run (each from the picks before it), half of them before the fast run and half after it, and its
total is the median of a pick times k: an estimate, and called so. For scale, the time of one product in float32, which
could not tell near ties apart, is shown too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence import InteractionGreedy
from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.greedy_plain import plain_picks

BLOCK = 4096


def write_features(path: Path, kind: str, n: int, d: int) -> None:
    """Rows of unit length, float16."""
    generator = torch.Generator().manual_seed(0)
    deviations = torch.arange(1, d + 1).rsqrt() if kind == "spectrum" else torch.ones(d)
    centres = torch.randn(50, d, generator=generator) + torch.randn(d, generator=generator)
    shares = torch.rand(50, generator=generator) ** 2
    with path.open("wb") as file:
        for start in range(0, n, BLOCK):
            rows = torch.randn(min(BLOCK, n - start), d, generator=generator)
            if kind == "spectrum":
                rows += centres[torch.multinomial(shares, len(rows), replacement=True, generator=generator)]
            rows *= deviations
            file.write((rows / rows.norm(dim=1, keepdim=True)).half().numpy().tobytes())


def open_features(path: Path, n: int, d: int) -> np.ndarray[Any, Any]:
    return np.memmap(path, dtype=np.float16, mode="r", shape=(n, d))


def first_order(features: np.ndarray[Any, Any], kind: str, k: int) -> Tensor:
    n, d = features.shape
    deviations = torch.arange(1, d + 1).rsqrt() if kind == "spectrum" else torch.ones(d)
    v = deviations * torch.randn(d, generator=torch.Generator().manual_seed(1))
    parts = [torch.tensor(features[i : i + BLOCK]).float() @ v for i in range(0, n, BLOCK)]
    values = torch.cat(parts).double()
    best = values.topk(k).indices
    group = sum(torch.tensor(features[part.numpy()]).double().sum(dim=0) for part in best.split(BLOCK))
    return values * float(group @ group / values[best].sum())


def status_mib(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def child(job: dict[str, Any]) -> dict[str, Any]:
    """One run: whole with either method, or some plain picks at given places of a run."""
    torch.eye(64).double() @ torch.eye(64).double()  # the libraries behind it are loaded before memory is measured
    before, n, d, k = status_mib("VmRSS"), job["n"], job["d"], job["k"]
    features, values = open_features(Path(job["features"]), n, d), torch.from_numpy(np.load(job["values"]))
    if job["task"] != "steps":
        begun = time.perf_counter()
        selection = InteractionGreedy(job["task"]).select(values, features, budget=k)
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "picks": selection.positions, "peak_mib": status_mib("VmHWM") - before}
    pool = Factors.checked("greedy", values, features)
    seconds, picks = [], []
    for step in job["steps"]:
        ahead = plain_picks(pool, 2, job["picks"][:step])
        first = next(ahead)  # includes what is done once
        begun = time.perf_counter()
        picks.append([first, next(ahead)])
        seconds.append(time.perf_counter() - begun)
    return {"seconds": seconds, "picks": picks, "float32": float32_product(features)}


def float32_product(features: np.ndarray[Any, Any]) -> float:
    """Seconds of one blocked product F u in float32, from float16 features in memory."""
    rows, vector = torch.from_numpy(features.view(np.ndarray).copy()), torch.ones(features.shape[1])
    size = max(1, 2**18 // features.shape[1])
    scratch, times = torch.empty(size, features.shape[1]), []
    for _ in range(3):
        begun = time.perf_counter()
        for block in rows.split(size):
            scratch[: len(block)].copy_(block) @ vector
        times.append(time.perf_counter() - begun)
    return min(times)


def run(job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--child"], input=json.dumps(job), text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare_whole(job: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Both methods from the first to the last pick, in turns."""
    runs: dict[str, list[dict[str, Any]]] = {"pruned": [], "plain": []}
    for round_ in range(rounds):
        for task in ("pruned", "plain") if round_ % 2 else ("plain", "pruned"):
            runs[task].append(run({**job, "task": task}))
    fast, plain = (statistics.median(r["seconds"] for r in runs[task]) for task in ("pruned", "plain"))
    same = all(r["picks"] == runs["plain"][0]["picks"] for r in runs["pruned"])
    print(f"  pruned {fast:.2f} s, plain {plain:.2f} s (medians of {rounds} whole runs)")
    return {"fast": fast, "plain": plain, "same": same, "peak": max(r["peak_mib"] for r in runs["pruned"])}


def compare_sampled(job: dict[str, Any], count: int) -> dict[str, Any]:
    """The fast method whole; the plain one at picks spread over the run, before and after it."""
    fast = run({**job, "task": "pruned"})
    places = sorted({round(i * (job["k"] - 2) / (count - 1)) for i in range(count)})
    first = run({**job, "task": "steps", "picks": fast["picks"], "steps": places[::2]})
    again = run({**job, "task": "pruned"})
    second = run({**job, "task": "steps", "picks": fast["picks"], "steps": places[1::2]})
    same = fast["picks"] == again["picks"] and all(
        picks == fast["picks"][place : place + 2]
        for part, where in ((first, places[::2]), (second, places[1::2]))
        for place, picks in zip(where, part["picks"], strict=True)
    )
    step, seconds = (
        statistics.median(first["seconds"] + second["seconds"]),
        statistics.median([fast["seconds"], again["seconds"]]),
    )
    print(
        f"  pruned {seconds:.1f} s (2 whole runs); plain {step:.3f} s a pick (median of {len(places)} picks, also the "
        f"ones compared), so about {step * job['k']:.0f} s for all: an estimate"
    )
    matvec = min(first["float32"], second["float32"])
    print(
        f"  one float32 product of all rows takes {matvec:.3f} s, so {matvec * job['k'] / seconds:.1f} x the fast run"
    )
    peak = max(fast["peak_mib"], again["peak_mib"])
    return {"fast": seconds, "plain": step * job["k"], "same": same, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8,000 rows of 1,024 numbers, whole runs")
    parser.add_argument("--sizes", nargs="+", default=["100000x4096x1000", "270000x512x13500"], help="N x d x k")
    parser.add_argument("--kinds", nargs="+", default=["spectrum", "isotropic"])
    parser.add_argument("--plain-steps", type=int, default=20)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(sys.stdin.read()))))
        return
    result: dict[str, dict[str, dict[str, Any]]] = {"speedup_plain": {}, "same_picks": {}, "peak_ratio": {}}
    for size in ["8000x1024x300"] if args.quick else args.sizes:
        n, d, k = (int(part) for part in size.split("x"))
        for kind in args.kinds:
            with tempfile.TemporaryDirectory() as folder:
                features, values = Path(folder) / "features.bin", Path(folder) / "values.npy"
                write_features(features, kind, n, d)
                np.save(values, first_order(open_features(features, n, d), kind, k).numpy())
                print(f"N={n} d={d} k={k} {kind}, {torch.get_num_threads()} threads")
                job = {"features": str(features), "values": str(values), "n": n, "d": d, "k": k}
                found = compare_whole(job, 2) if args.quick else compare_sampled(job, args.plain_steps)
            ratio = found["peak"] / (n * d * 2 / 2**20)
            print(
                f"  {found['plain'] / found['fast']:.1f} x, same picks: {found['same']}, memory {ratio:.2f} x features"
            )
            for name, value in (
                ("speedup_plain", round(found["plain"] / found["fast"], 1)),
                ("same_picks", found["same"]),
                ("peak_ratio", round(ratio, 3)),
            ):
                result[name].setdefault(size, {})[kind] = value
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
