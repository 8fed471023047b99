"""Which part of a pool is worth training on? Held-out loss and class entropy over sizes of the selection.

    python examples/subset_selection.py [--set digits] [--data DIR] [--noise 0.2 0] [--seeds 3] [--jobs 4] [--quick]

A small network is trained on the pool for a few steps; from its gradients a part of the pool is selected by each
method; fresh networks are trained on each part, all for the same number of steps, and measured on examples that
nothing has seen. A seed draws pool, targets and held-out examples anew; a loss is the mean of several networks, for
random parts of as many draws. Sets: scikit-learn's digits, or mnist and fashion_mnist from folders of that name with
the four files of the original format in DIR (default: the environment variable LI_DATA). With --jobs, seeds and
shares of wrong labels are shared out over processes; the results are the same. The last line is machine-readable.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import (
    EKFAC,
    GroupEffects,
    InfluenceFunction,
    InteractionGreedy,
    Interactions,
    Newton,
    NewtonGreedy,
    Random,
    TargetRows,
    TopK,
    held_out_pool,
    held_out_ridge,
    held_out_weight,
)
from lightning_influence.metrics import class_entropy
from lightning_influence.metrics.intervals import student_interval
from lightning_influence.selection import NewtonPool, Selection
from lightning_influence.selection.pipeline import choose

METHODS = ("random", "additive", "interactions", "basu", "newton")  # basu: first order and his second order, F+B
# What is found by other rules than the defaults: the loss of the targets alone, mixed with the pool's; raw gradients;
# ridge, weight, and raw or unit gradients by held-out targets.
MORE = (
    "newton-targets",
    "newton-shrunk",
    "newton-raw",
    "newton-held-out",
    "interactions-held-out",
    "normalise-held-out",
)
FOLDS, RIDGES = 3, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
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
    """Networks of one split, their mean; entropy in nats and share of wrong labels of what they were trained on."""

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


Rows = Sequence[int]


class Chooser:
    """What the methods take of the pool of one split, for each network; computed for those that ask."""

    def __init__(self, model: nn.Module, parts: Parts, seed: int, options: argparse.Namespace) -> None:
        self.parts, self.seed, self.options = parts, seed, options
        self.model = model

    @cached_property
    def influence(self) -> InfluenceFunction:
        return self.fitted(normalise=True)

    @cached_property
    def newton(self) -> NewtonPool:
        return self.scored(self.influence)

    @cached_property
    def raw(self) -> NewtonPool:
        return self.scored(self.fitted(normalise=False))

    @cached_property
    def interactions(self) -> Interactions:
        return Interactions.from_scores(self.influence.score(self.parts.targets, self.parts.pool))

    @cached_property
    def second_order(self) -> Interactions:
        """Of the same inner products that newton has."""
        features, goals = self.newton.features, self.newton.targets
        effects = GroupEffects.from_gradients(features, goals.mean(0), TargetRows(goals), curvature_rows=features)
        return effects.interactions("F+B")

    def fitted(self, normalise: bool) -> InfluenceFunction:
        influence = InfluenceFunction(self.model, EKFAC(seed=self.seed), normalise=normalise, progress=False)
        return influence.fit(self.parts.pool)

    def scored(self, influence: InfluenceFunction) -> NewtonPool:
        landmarks = len(self.parts.pool) if self.options.landmarks is None else self.options.landmarks
        return NewtonPool.scored(influence, self.parts.targets, self.parts.pool, landmarks=landmarks)

    def rows(self, method: str, size: int) -> list[Rows]:
        if method == "random":
            draws = [Random(1000 * network + self.seed) for network in range(self.options.networks)]
            return [choose(self.interactions, rule, size).positions for rule in draws]
        return [self.selection(method, size).positions] * self.options.networks

    def selection(self, method: str, size: int) -> Selection:
        if method == "newton":
            return self.newton.select(size)
        if method in MORE:
            return self.otherwise(method, size)
        if method == "additive":
            return choose(self.interactions, TopK(), size)
        return choose(self.second_order if method == "basu" else self.interactions, InteractionGreedy(), size)

    def otherwise(self, method: str, size: int) -> Selection:
        """What the defaults decide otherwise."""
        if method in ("newton-targets", "newton-shrunk"):
            return self.newton.select(size, Newton(shrink=method == "newton-shrunk"))
        if method == "newton-held-out":
            choice = held_out_ridge(self.newton, size, ridges=RIDGES, folds=FOLDS)
            return self.newton.select(size, NewtonGreedy(choice.best))
        if method == "interactions-held-out":
            scores = self.newton.targets @ self.newton.features.T
            weight = held_out_weight(scores, size, folds=FOLDS).best
            return self.interactions.reweighted(weight).select(InteractionGreedy(), size)
        pools = {"raw": self.raw, "unit": self.newton}
        chosen = "raw" if method == "newton-raw" else held_out_pool(pools, size, folds=FOLDS).best
        return pools[chosen].select(size)


def trial(parts: Parts, setting: Setting, noise: float, seed: int, options: argparse.Namespace) -> Iterator[Result]:
    """All networks of one split."""
    whole = range(setting.pool)
    warm = train(parts.pool, whole, setting.warm_up, 1000 + seed, settle=False)
    chooser = Chooser(warm, parts, seed, options)
    for size in setting.sizes:
        for method in options.methods:
            yield measured(parts, setting, method, chooser.rows(method, size), noise, seed)
    yield measured(parts, setting, "whole pool", [whole] * options.networks, noise, seed)


def split(setting: Setting, noise: float, seed: int, options: argparse.Namespace) -> list[Result]:
    """One of the jobs, in a process of its own or not."""
    torch.set_num_threads(1)  # such small matrices are faster so, and sums are the same with any number of jobs
    parts = Parts.draw(*load(options.set, options.data), setting, noise, seed)
    return list(trial(parts, setting, noise, seed, options))


def splits(setting: Setting, options: argparse.Namespace) -> list[Result]:
    """Every share of wrong labels with every seed, in this order, whichever is done first."""
    started = time.perf_counter()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    asked = [(noise, seed) for noise in options.noise for seed in seeds]
    found: dict[tuple[float, int], list[Result]] = {}

    def done(noise: float, seed: int, results: list[Result]) -> None:
        found[noise, seed] = results
        print(f"{options.set}, noise {noise:g}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)

    if options.jobs == 1:
        for noise, seed in asked:
            done(noise, seed, split(setting, noise, seed, options))
    else:
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as processes:
            running = {processes.submit(split, setting, *pair, options): pair for pair in asked}
            for future in as_completed(running):
                done(*running[future], future.result())
    return [result for pair in asked for result in found[pair]]


def measured(parts: Parts, setting: Setting, method: str, chosen: list[Rows], noise: float, seed: int) -> Result:
    """One network for each of the selections, which are of one size."""
    images, labels = parts.held_out.tensors
    losses, entropies, wrong = [], [], []
    for network, rows in enumerate(chosen):
        model = train(parts.pool, rows, setting.steps, 1000 * network + seed)
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(images), labels)))
        given, truth = parts.pool.tensors[1][list(rows)], parts.truth[list(rows)]
        entropies.append(float(class_entropy(given, CLASSES)))
        wrong.append(float((given != truth).float().mean()))
    means = map(statistics.fmean, (losses, entropies, wrong))
    return Result(noise, seed, method, len(chosen[0]), *means)


def table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Means over seeds, a line for each noise, size and method; differences of losses with their 95 % intervals."""
    groups: dict[tuple[float, int, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.noise, result.rows, result.method), []).append(result)
    losses = {key: torch.tensor([result.loss for result in own]) for key, own in groups.items()}
    whole = max(rows for _, rows, _ in groups)
    lines = []
    for (noise, rows, method), own in groups.items():
        loss = losses[noise, rows, method]
        line: dict[str, Any] = {"noise": noise, "rows": rows, "method": method, "loss": round(float(loss.mean()), 4)}
        line["entropy"] = round(statistics.fmean(result.entropy for result in own), 4)
        line["wrong"] = round(statistics.fmean(result.wrong for result in own), 4)
        for name, other in (("random", (noise, rows, "random")), ("whole", (noise, whole, "whole pool"))):
            if other in losses and method not in (name, "whole pool"):
                below = losses[other] - loss
                line[f"below_{name}"] = round(float(below.mean()), 4)
                if len(own) > 1:
                    line[f"below_{name}_interval"] = [round(end, 4) for end in student_interval(below)]
        line["seeds"] = {result.seed: round(result.loss, 4) for result in own}
        lines.append(line)
    return lines


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", choices=SETTINGS, default="digits")
    parser.add_argument("--data", type=Path, default=os.environ.get("LI_DATA"), help="folder of mnist, fashion_mnist")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.2, 0.0], help="shares of wrong labels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="the others follow it")
    parser.add_argument("--networks", type=int, default=3, help="trained on each selection")
    parser.add_argument("--methods", nargs="+", choices=METHODS + MORE, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--sizes", type=int, nargs="+", help="of the selections, in rows; default: three for each set")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--landmarks", type=int, help="pool rows that newton knows the others by; default: all")
    parser.add_argument("--targets", type=int, help="examples to select by; default: 300 digits, 400 of the other sets")
    parser.add_argument("--quick", action="store_true", help="one seed and network, wrong labels alone, two sizes")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.networks, options.jobs) < 1 or not all(0 <= noise <= 1 for noise in options.noise):
        parser.error("expected --seeds, --networks and --jobs >= 1 and --noise as shares, such as 0.2")
    if options.first_seed < 0:
        parser.error(f"expected --first-seed >= 0, got {options.first_seed}")
    pool, most = SETTINGS[options.set].pool, SETTINGS[options.set].targets
    options.targets = most if options.targets is None else options.targets
    if not 1 <= options.targets <= most:
        parser.error(f"expected --targets from 1 to {most}, got {options.targets}")
    if any(size % BATCH or not 0 < size <= pool for size in options.sizes or ()):
        parser.error(f"expected --sizes as multiples of {BATCH}, the batch, up to {pool} rows")
    if options.quick:
        options.seeds, options.networks, options.noise = 1, 1, options.noise[:1]
    for name in ("methods", "sizes", "noise"):  # each once
        setattr(options, name, list(dict.fromkeys(getattr(options, name) or ())))
    options.data = None if options.data is None else Path(options.data)
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    setting = SETTINGS[options.set]
    sizes = options.sizes or (setting.sizes[:2] if options.quick else setting.sizes)
    results = splits(replace(setting, sizes=tuple(sizes), targets=options.targets), options)
    lines = table(results)
    show(lines)
    names = ("set", "first_seed", "seeds", "networks", "landmarks", "targets")
    print("RESULT", json.dumps({**{name: getattr(options, name) for name in names}, "lines": lines}))


def show(lines: Sequence[dict[str, Any]]) -> None:
    print(f"noise  rows {'method':<21}   loss entropy wrong  below random             below the whole pool")
    for line in lines:
        spans = []
        for name in ("below_random", "below_whole"):
            low, high = line.get(f"{name}_interval", (None, None))
            mean = f"{line[name]:.3f}" if name in line else ""
            spans.append(mean if low is None else f"{mean} ({low:.3f} to {high:.3f})")
        numbers = f"{line['loss']:>6.3f} {line['entropy']:>7.2f} {line['wrong']:>5.2f}"
        print(f"{line['noise']:>5} {line['rows']:>5} {line['method']:<21} {numbers}  {spans[0]:<24} {spans[1]}")


if __name__ == "__main__":
    main(sys.argv[1:])
