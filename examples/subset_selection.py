"""Which part of a pool is worth training on? Held-out loss and class entropy over sizes of the selection.

    python examples/subset_selection.py [--set digits] [--data DIR] [--noise 0.2 0] [--seeds 3] [--quick]

A small network is trained on the pool for a few steps; from its gradients a part of the pool is selected by each
method; fresh networks are trained on each part, all for the same number of steps, and measured on examples that
nothing has seen. Sets: scikit-learn's digits, or mnist and fashion_mnist from folders of that name with the four files
of the original format in DIR (default: the environment variable LI_DATA). The last line is machine-readable.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import EKFAC, InfluenceFunction, InteractionGreedy, Interactions, Random, Selection, TopK
from lightning_influence.metrics import class_entropy
from lightning_influence.selection import NewtonPool
from lightning_influence.selection.pipeline import choose

METHODS = ("random", "additive", "interactions", "newton")
BATCH = 25  # divides every size
RATE = 0.1
CLASSES = 10


@dataclass(frozen=True)
class Setting:
    """A data set and how it is used."""

    pool: int
    targets: int
    held_out: int
    sizes: tuple[int, ...]
    warm_up: int
    steps: int


SETTINGS = {
    "digits": Setting(1000, 300, 497, (50, 100, 200), 30, 300),
    "mnist": Setting(2000, 400, 5000, (50, 200, 500), 40, 600),
    "fashion_mnist": Setting(2000, 400, 5000, (50, 200, 500), 40, 600),
}


@dataclass(frozen=True)
class Parts:
    """One split; the pool has the labels that are given, right or wrong, and ``truth`` has the right ones."""

    pool: TensorDataset
    truth: Tensor
    targets: TensorDataset
    held_out: TensorDataset

    @classmethod
    def draw(cls, images: Tensor, labels: Tensor, setting: Setting, noise: float, seed: int) -> Parts:
        generator = torch.Generator().manual_seed(seed)
        ends = torch.tensor([setting.pool, setting.targets, setting.held_out]).cumsum(0).tolist()
        pool, targets, held_out, _ = torch.randperm(len(labels), generator=generator).tensor_split(ends)
        given = labels[pool].clone()
        wrong = torch.randperm(len(pool), generator=generator)[: round(noise * len(pool))]
        given[wrong] = (given[wrong] + torch.randint(1, CLASSES, wrong.shape, generator=generator)) % CLASSES
        return cls(
            TensorDataset(images[pool], given),
            labels[pool],
            TensorDataset(images[targets], labels[targets]),
            TensorDataset(images[held_out], labels[held_out]),
        )


@dataclass(frozen=True)
class Result:
    """One trained network; entropy in nats and share of wrong labels of what it was trained on."""

    noise: float
    seed: int
    method: str
    rows: int
    loss: float
    entropy: float
    wrong: float


def load(name: str, folder: Path | None) -> tuple[Tensor, Tensor]:
    """Images [n, d] in [0, 1] and labels [n]."""
    if name == "digits":
        from sklearn.datasets import load_digits

        data = load_digits()
        return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    if folder is None:
        sys.exit(f"--set {name}: expected --data DIR or LI_DATA, a folder that holds {name}/train-images-idx3-ubyte.gz")
    images, labels = (idx(folder / name / f"train-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
    return torch.from_numpy(images.reshape(len(labels), -1).astype(np.float32) / 255), torch.from_numpy(labels).long()


def idx(path: Path) -> np.ndarray:
    """An array of bytes in the format of MNIST: two zeros, the type, the number of dimensions, each of them."""
    with gzip.open(path) as file:
        content = file.read()
    dimensions = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(dimensions).copy()


def train(data: TensorDataset, rows: Sequence[int], steps: int, seed: int, settle: bool = True) -> nn.Sequential:
    """A new network d-128-64-10 after so many steps of SGD on some rows, in a new order for every epoch.

    To settle, the learning rate falls to 0 over the last fifth: at a constant one the loss depends more on the last
    steps than on the rows (on the same 500 rows of FashionMNIST, three networks: 0.68, 1.22, 0.67).
    """
    images, labels = (tensor[list(rows)] for tensor in data.tensors)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(images.shape[1], 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, CLASSES)]
        model = nn.Sequential(*layers)
    generator, optimizer = torch.Generator().manual_seed(seed), torch.optim.SGD(model.parameters(), RATE)
    left: list[Tensor] = []
    for step in range(steps):
        if settle:
            optimizer.param_groups[0]["lr"] = RATE * min(1.0, 5 * (1 - step / steps))
        if not left:
            left = list(torch.randperm(len(labels), generator=generator).split(BATCH))
        batch = left.pop()
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model


def selections(
    model: nn.Module, parts: Parts, sizes: Sequence[int], seed: int, gradients: str
) -> Iterator[tuple[str, Selection]]:
    """What each method takes, at every size."""
    influence = InfluenceFunction(model, EKFAC(seed=seed), normalise=True, progress=False).fit(parts.pool)
    interactions = Interactions.from_scores(influence.score(parts.targets, parts.pool))
    make = NewtonPool.whitened if gradients == "whole" else NewtonPool.scored
    newton = make(influence, parts.targets, parts.pool)
    for size in sizes:
        yield "random", choose(interactions, Random(seed), size)
        yield "additive", choose(interactions, TopK(), size)
        yield "interactions", choose(interactions, InteractionGreedy(), size)
        yield "newton", newton.select(size)


def trial(
    parts: Parts, setting: Setting, sizes: Sequence[int], noise: float, seed: int, gradients: str
) -> Iterator[Result]:
    """All networks of one split."""
    whole = range(setting.pool)
    warm = train(parts.pool, whole, setting.warm_up, 1000 + seed, settle=False)
    for method, selection in selections(warm, parts, sizes, seed, gradients):
        model = train(parts.pool, selection.positions, setting.steps, seed)
        yield measured(parts, model, method, selection.positions, noise, seed)
    yield measured(parts, train(parts.pool, whole, setting.steps, seed), "whole pool", whole, noise, seed)


@torch.no_grad()
def measured(parts: Parts, model: nn.Module, method: str, rows: Sequence[int], noise: float, seed: int) -> Result:
    images, labels = parts.held_out.tensors
    given, truth = parts.pool.tensors[1][list(rows)], parts.truth[list(rows)]
    loss = float(F.cross_entropy(model(images), labels))
    wrong = float((given != truth).float().mean())
    return Result(noise, seed, method, len(rows), loss, float(class_entropy(given, CLASSES)), wrong)


def table(results: Sequence[Result]) -> list[dict[str, float | int | str]]:
    """Means over seeds, a line for each noise, size and method."""
    groups: dict[tuple[float, int, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.noise, result.rows, result.method), []).append(result)
    lines: list[dict[str, float | int | str]] = []
    for (noise, rows, method), own in groups.items():
        losses = [result.loss for result in own]
        random = {result.seed: result.loss for result in groups.get((noise, rows, "random"), [])}
        lines.append(
            {
                "noise": noise,
                "rows": rows,
                "method": method,
                "loss": round(statistics.fmean(losses), 4),
                "std": round(statistics.stdev(losses), 4) if len(losses) > 1 else 0.0,
                "entropy": round(statistics.fmean(result.entropy for result in own), 4),
                "wrong": round(statistics.fmean(result.wrong for result in own), 4),
                "below_random": sum(result.loss < random.get(result.seed, -1.0) for result in own),
                "seeds": len(own),
            }
        )
    return lines


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", choices=SETTINGS, default="digits")
    parser.add_argument("--data", type=Path, default=os.environ.get("LI_DATA"), help="folder of mnist, fashion_mnist")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.2, 0.0], help="shares of wrong labels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--gradients",
        choices=("scores", "whole"),
        default="scores",
        help="what newton knows of the pool; whole is slow",
    )
    parser.add_argument("--quick", action="store_true", help="one seed, wrong labels alone, the two smaller sizes")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or not all(0 <= noise <= 1 for noise in options.noise):
        parser.error("expected --seeds >= 1 and --noise as shares, such as 0.2")
    if options.quick:
        options.seeds, options.noise = 1, options.noise[:1]
    options.data = None if options.data is None else Path(options.data)
    return options


def main(arguments: Sequence[str]) -> None:
    options, started = parse(arguments), time.perf_counter()
    torch.set_num_threads(1)  # such small matrices are faster so
    setting = SETTINGS[options.set]
    sizes = setting.sizes[:2] if options.quick else setting.sizes
    images, labels = load(options.set, options.data)
    results = []
    for noise in options.noise:
        for seed in range(options.seeds):
            parts = Parts.draw(images, labels, setting, noise, seed)
            results += trial(parts, setting, sizes, noise, seed, options.gradients)
            print(f"{options.set}, noise {noise:g}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    lines = table(results)
    print(f"{'noise':>5} {'rows':>5} {'method':<12} {'loss':>6} {'std':>5} {'entropy':>7} {'wrong':>5}  below random")
    for line in lines:
        spread = f"{line['loss']:>6.3f} {line['std']:>5.3f} {line['entropy']:>7.2f} {line['wrong']:>5.2f}"
        versus = f"{line['below_random']} of {line['seeds']}" if line["method"] in METHODS[1:] else ""
        print(f"{line['noise']:>5} {line['rows']:>5} {line['method']:<12} {spread}  {versus}")
    print(
        "RESULT",
        json.dumps({"set": options.set, "seeds": options.seeds, "gradients": options.gradients, "lines": lines}),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
