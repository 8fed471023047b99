"""Results of `less_recipe.py`: a table for each target, ranks over targets, and a machine-readable line."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_influence.metrics.intervals import student_interval


@dataclass(frozen=True)
class Outcome:
    """Loss of one fine-tuned model on the held-out rows of one target."""

    target: str
    method: str
    seed: int
    loss: float


@dataclass(frozen=True)
class Line:
    """One method on one target.

    Attributes:
        losses: By seed.
        rank: Among the methods that have all seeds, 1 for the lowest mean; equal ones share the mean of their places.
            None where seeds are missing.
    """

    target: str
    method: str
    losses: dict[int, float]
    rank: float | None

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses.values())

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % by Student over seeds; None for one seed."""
        low, high = student_interval(torch.tensor(list(self.losses.values()), dtype=torch.float64))
        return None if math.isinf(low) else (low, high)


def lines(outcomes: Sequence[Outcome]) -> list[Line]:
    """By target, best first; a method whose seeds are not all there is listed after the others, without a rank."""
    losses: dict[str, dict[str, dict[int, float]]] = {}
    for one in outcomes:
        losses.setdefault(one.target, {}).setdefault(one.method, {})[one.seed] = one.loss
    found = []
    for target, methods in losses.items():
        seeds = {seed for own in methods.values() for seed in own}
        means = {name: statistics.fmean(own.values()) for name, own in methods.items() if set(own) == seeds}
        ranked = [Line(target, name, own, _rank(name, means)) for name, own in methods.items()]
        found += sorted(ranked, key=lambda line: (line.rank is None, line.loss))
    return found


def _rank(name: str, means: dict[str, float]) -> float | None:
    if name not in means:
        return None
    below = sum(mean < means[name] for mean in means.values())
    return below + (1 + sum(mean == means[name] for mean in means.values())) / 2


def mean_ranks(found: Sequence[Line]) -> dict[str, float]:
    """Of the methods that have a rank on every target, best first."""
    targets = {line.target for line in found}
    ranks: dict[str, list[float]] = {}
    for line in found:
        if line.rank is not None:
            ranks.setdefault(line.method, []).append(line.rank)
    means = {name: statistics.fmean(own) for name, own in ranks.items() if len(own) == len(targets)}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def seed_ranks(found: Sequence[Line]) -> dict[str, list[float]]:
    """Mean rank over targets at each seed that all targets have, of the methods of `mean_ranks`, in their order."""
    names = list(mean_ranks(found))
    losses = {(line.target, line.method): line.losses for line in found if line.method in names}
    targets = list(dict.fromkeys(line.target for line in found))
    seeds = sorted(set.intersection(*(set(own) for own in losses.values()))) if losses else []
    ranks: dict[str, list[float]] = {name: [] for name in names}
    for seed in seeds:
        tables = [{name: losses[target, name][seed] for name in names} for target in targets]
        for name in names:
            ranks[name].append(statistics.fmean(_rank(name, own) or 0.0 for own in tables))
    return ranks


def table(found: Sequence[Line], untouched: dict[str, float]) -> str:
    """For a terminal."""
    texts = []
    for target in dict.fromkeys(line.target for line in found):
        own = [line for line in found if line.target == target]
        random = next((line.losses for line in own if line.method == "random"), {})
        texts.append(f"\n{target}: {'rank':>4}  {'loss':>6}  95 % over seeds   seeds  below random")
        for line in own:
            ends = "" if line.interval is None else "{:.3f} to {:.3f}".format(*line.interval)
            rank = "" if line.rank is None else f"{line.rank:g}"
            both = [seed for seed in line.losses if seed in random]
            below = sum(line.losses[seed] < random[seed] for seed in both)
            versus = "" if line.method == "random" else f"{below} of {len(both)}"
            head = f"  {line.method:<20} {rank:>4}  {line.loss:>6.3f}"
            texts.append(f"{head}  {ends:<16}  {len(line.losses):>5}  {versus}")
        texts.append(f"  {'untouched model':<20} {'':>4}  {untouched[target]:>6.3f}")
    texts.append("\nmean rank over targets  single seeds")
    single = seed_ranks(found)
    for name, rank in mean_ranks(found).items():
        spread = f"{min(single[name]):.2f} to {max(single[name]):.2f}" if single[name] else ""
        texts.append(f"  {name:<20} {rank:>5.2f}  {spread}".rstrip())
    return "\n".join(texts)


def result(found: Sequence[Line], untouched: dict[str, float]) -> dict[str, Any]:
    """What stands behind RESULT."""
    targets: dict[str, dict[str, Any]] = {}
    for line in found:
        targets.setdefault(line.target, {})[line.method] = {
            "target_loss": line.loss,
            "interval": line.interval,
            "rank": line.rank,
            "seeds": sorted(line.losses),
        }
    return {"targets": targets, "mean_rank": mean_ranks(found), "seed_ranks": seed_ranks(found), "untouched": untouched}
