"""Exact greedy selection against plain Algorithm 1: time, the same picks, and memory.

    python examples/benchmarks/greedy.py [--quick] [--sizes 100000x4096x1000 270000x512x13500] [--plain-steps 20]
        [--device cuda] [--method auto]

Each run is a process of its own that memory-maps float16 features, and copies them to the --device if that is a GPU:
before anything is timed, and for all rivals alike. Two kinds of features, rows of unit length:

- spectrum: 50 clusters of unequal size around a common mean, variances falling like 1 / i, as gradients have;
- isotropic: independent normal numbers, where no direction leads and bounds can skip nothing.

b = F v for a random v of the features' own spectrum, scaled so that the k rows of the largest b, taken together, just
use up the gain along their sum. Two rivals evaluate every row for every pick, in blocks, with the same library and as
many threads: `speedup_plain` is against one float32 product F (M U) a pick, all in float32, which near ties may lead
to other picks; `speedup_float64` against the package's own plain loop, whose products are in float64 and whose picks
have to be the same. Of the rivals only the picks are timed, not what is done once; of the fast way all of `select`.
With --quick all run whole, once. Otherwise picks of both rivals are timed, and those in float64 compared, at a
number of places spread over the run (each from the picks before it), half of them before the fast run and half after
it; their totals are the median of a pick times k: an estimate, and called so.

With one thread the seconds are those of the processor, which others that use the machine do not add to. Memory is the
peak that `select` adds to what is held after a small one has loaded the libraries (Linux only); the pages of the file
are counted. On a GPU it is the peak of what is allocated there, with the features.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from devices import clock, runs_on
from torch import Tensor

from lightning_influence import InteractionGreedy
from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.greedy_plain import plain_picks

BLOCK = 4096
CPU = torch.device("cpu")


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


def open_features(path: str | Path, n: int, d: int, device: torch.device) -> Tensor:
    """The file itself as memory, or a copy of it on a GPU."""
    return torch.from_numpy(np.memmap(path, dtype=np.float16, mode="c", shape=(n, d))).to(device)


def first_order(features: Tensor, kind: str, k: int) -> Tensor:
    n, d = features.shape
    deviations = torch.arange(1, d + 1).rsqrt() if kind == "spectrum" else torch.ones(d)
    v = deviations * torch.randn(d, generator=torch.Generator().manual_seed(1))
    parts = [features[i : i + BLOCK].float() @ v for i in range(0, n, BLOCK)]
    values = torch.cat(parts).double()
    best = values.topk(k).indices
    group = sum(features[part].double().sum(dim=0) for part in best.split(BLOCK))
    return values * float(group @ group / values[best].sum())


def status_mib(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def held_mib(device: torch.device) -> float:
    """What is held now, of the GPU nothing; its peak is forgotten: imports take more than what they leave."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0.0
    Path("/proc/self/clear_refs").write_text("5")
    return status_mib("VmRSS")


def peak_mib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else status_mib("VmHWM")


def child(job: dict[str, Any]) -> dict[str, Any]:
    """One run: whole with some method, or single picks of both rivals at given places of a run."""
    device = torch.device(job["device"])
    features = open_features(job["features"], job["n"], job["d"], device)
    values = torch.from_numpy(np.load(job["values"])).to(device)
    if job["task"] == "float32":
        seconds, picks = float32_picks(values, features, job["k"], [])
        return {"seconds": sum(seconds), "picks": picks}
    if job["task"] == "steps":
        return steps(job, values, features)
    few = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)).to(device)
    InteractionGreedy("pruned").select(few[:, 0], few, budget=20)  # loads libraries before memory is measured
    before, begun = held_mib(device), clock(device)
    selection = InteractionGreedy(job["task"]).select(values, features, budget=job["k"])
    return {"seconds": clock(device) - begun, "picks": selection.positions, "peak_mib": peak_mib(device) - before}


def steps(job: dict[str, Any], values: Tensor, features: Tensor) -> dict[str, Any]:
    """Seconds of one pick of either rival, given the picks before it, and the float64 picks."""
    pool = Factors.checked("greedy", values, features)
    found: dict[str, list[Any]] = {"seconds": [], "float32": [], "picks": []}
    for step in job["steps"]:
        ahead = plain_picks(pool, 2, job["picks"][:step])
        first = next(ahead)  # includes what is done once
        begun = clock(values.device)
        found["picks"].append([first, next(ahead)])
        found["seconds"].append(clock(values.device) - begun)
        found["float32"].append(min(float32_picks(values, features, 2, job["picks"][:step])[0]))
    return found


def float32_picks(values: Tensor, rows: Tensor, count: int, before: list[int]) -> tuple[list[float], list[int]]:
    """Algorithm 1 in float32: seconds of each pick, and the picks."""
    device, length = rows.device, rows.shape[1]
    size = max(1, (2**19 if device.type == "cpu" else 2**26) // length)  # quickest on the processor at hand
    block = torch.empty(size, length, device=device)
    alone = torch.cat([0.5 * part.float().square().sum(dim=1) for part in rows.split(size)]) - values.float()
    alone[before] = torch.inf
    total = torch.zeros(length, device=device)
    for part in torch.tensor(before, dtype=torch.long, device=device).split(size):
        total += rows[part].float().sum(dim=0)
    seconds, picks = [], []
    for _ in range(count):
        begun = clock(device)
        products = [block[: len(part)].copy_(part) @ total for part in rows.split(size)]
        picks.append(int((alone + torch.cat(products)).argmin()))
        alone[picks[-1]] = torch.inf
        total += rows[picks[-1]].float()
        seconds.append(clock(device) - begun)
    return seconds, picks


def run(job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--child"], input=json.dumps(job), text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare_whole(job: dict[str, Any]) -> dict[str, Any]:
    """All three from the first to the last pick."""
    double, single, fast = (run({**job, "task": task}) for task in ("plain", "float32", job["method"]))
    print(
        f"  {job['method']} {fast['seconds']:.2f} s, plain {single['seconds']:.2f} s in float32, "
        f"{double['seconds']:.2f} s in float64 (whole runs)"
    )
    return {
        "fast": fast["seconds"],
        "float32": single["seconds"],
        "float64": double["seconds"],
        "same": fast["picks"] == double["picks"],
        "peak": fast["peak_mib"],
    }


def compare_sampled(job: dict[str, Any], count: int) -> dict[str, Any]:
    """The fast method whole; the plain ones at picks spread over the run, before and after it."""
    fast = run({**job, "task": job["method"]})
    places = sorted({round(i * (job["k"] - 2) / (count - 1)) for i in range(count)})
    parts = [places[::2], places[1::2]]
    first = run({**job, "task": "steps", "picks": fast["picks"], "steps": parts[0]})
    again = run({**job, "task": job["method"]})
    second = run({**job, "task": "steps", "picks": fast["picks"], "steps": parts[1]})
    same = fast["picks"] == again["picks"] and all(
        picks == fast["picks"][place : place + 2]
        for found, where in zip((first, second), parts, strict=True)
        for place, picks in zip(where, found["picks"], strict=True)
    )
    double, single = (statistics.median(first[key] + second[key]) for key in ("seconds", "float32"))
    seconds = statistics.median([fast["seconds"], again["seconds"]])
    print(
        f"  {job['method']} {seconds:.1f} s (2 whole runs); a plain pick {single:.4f} s in float32, "
        f"{double:.4f} s in float64 (median of {len(places)} picks, also the ones compared), so about "
        f"{single * job['k']:.1f} and {double * job['k']:.1f} s for all: estimates"
    )
    peak = max(fast["peak_mib"], again["peak_mib"])
    return {
        "fast": seconds,
        "float32": single * job["k"],
        "float64": double * job["k"],
        "same": same,
        "peak": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8,000 rows of 1,024 numbers, whole runs")
    parser.add_argument("--sizes", nargs="+", default=["100000x4096x1000", "270000x512x13500"], help="N x d x k")
    parser.add_argument("--kinds", nargs="+", default=["spectrum", "isotropic"])
    parser.add_argument("--plain-steps", type=int, default=20)
    parser.add_argument("--device", type=runs_on, default="cpu", help="cpu or cuda")
    parser.add_argument("--method", choices=("pruned", "auto"), default="pruned", help="auto: as `InteractionGreedy()`")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(sys.stdin.read()))))
        return
    result: dict[str, Any] = {"device": str(args.device), "method": args.method}
    for size in ["8000x1024x300"] if args.quick else args.sizes:
        n, d, k = (int(part) for part in size.split("x"))
        for kind in args.kinds:
            with tempfile.TemporaryDirectory() as folder:
                features, values = Path(folder) / "features.bin", Path(folder) / "values.npy"
                write_features(features, kind, n, d)
                np.save(values, first_order(open_features(features, n, d, CPU), kind, k).numpy())
                print(f"N={n} d={d} k={k} {kind}, {args.device}, {torch.get_num_threads()} threads", flush=True)
                job = {"features": str(features), "values": str(values), "n": n, "d": d, "k": k}
                job |= {"device": str(args.device), "method": args.method}
                found = compare_whole(job) if args.quick else compare_sampled(job, args.plain_steps)
            figures = {
                "speedup_plain": round(found["float32"] / found["fast"], 1),
                "speedup_float64": round(found["float64"] / found["fast"], 1),
                "same_picks": found["same"],
                "peak_ratio": round(found["peak"] / (n * d * 2 / 2**20), 3),
            }
            print(" ", figures, flush=True)
            for name, value in figures.items():
                result.setdefault(name, {}).setdefault(size, {})[kind] = value
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
