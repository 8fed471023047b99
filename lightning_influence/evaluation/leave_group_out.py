"""Leave-group-out retraining: what removing a group from the training set really does to a target ([IA] section 4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Id, check_ids, few
from lightning_influence.evaluation.agreement import AgreementReport, group_agreement
from lightning_influence.evaluation.retraining import Retraining, plain_ids, seed_numbers
from lightning_influence.metrics.rank_agreement import spearman


@dataclass(frozen=True, eq=False)
class GroupChanges:
    """What `leave_group_out` measured.

    Attributes:
        groups: Ids of the examples that were left out.
        seeds: Seeds of the trainings.
        base: Target loss after training on everything, float64 [seeds].
        losses: Target loss after training without each group, float64 [g, seeds].
    """

    groups: tuple[tuple[Id, ...], ...]
    seeds: tuple[int, ...]
    base: Tensor
    losses: Tensor

    @property
    def changes(self) -> Tensor:
        """Loss without the group minus loss with everything at the same seed, [g, seeds]; > 0: the group helped."""
        return self.losses - self.base

    @property
    def mean(self) -> Tensor:
        """Mean change over the seeds, [g]."""
        return self.changes.mean(1)

    @property
    def standard_error(self) -> Tensor:
        """Of the mean change, [g]; NaN for a single seed, whose spread is unknown."""
        k = len(self.seeds)
        return self.changes.std(1) / math.sqrt(k) if k > 1 else torch.full_like(self.losses[:, 0], torch.nan)

    @property
    def reliability(self) -> float:
        """Rank correlation that the mean change would have with that of as many other seeds; NaN for a single seed.

        Spearman-Brown on the mean rank correlation r of two seeds, k r / (1 + (k - 1) r). Estimates that know the truth
        would reach about its square root; far below 1, more seeds are needed before estimators can be told apart.
        """
        k = len(self.seeds)
        if k < 2 or len(self.groups) < 2:
            return math.nan
        pairs = torch.combinations(torch.arange(k))
        changes = self.changes.mT
        r = max(0.0, float(spearman(changes[pairs[:, 0]], changes[pairs[:, 1]]).mean()))
        return k * r / (1 + (k - 1) * r)

    def agreement(
        self, estimates: Tensor | Mapping[str, Tensor], *, seed: int = 0, resamples: int = 1000
    ) -> AgreementReport:
        """`group_agreement` with the mean change."""
        return group_agreement(estimates, self.mean, seed=seed, resamples=resamples)

    def rows(self) -> list[dict[str, Any]]:
        """A dict for each group, as a data frame takes them."""
        found = zip(self.groups, self.mean.tolist(), self.standard_error.tolist(), strict=True)
        return [
            {"group": number, "anchor": group[0], "size": len(group), "change": mean, "standard_error": error}
            for number, (group, mean, error) in enumerate(found)
        ]


def leave_group_out(
    retraining: Retraining,
    groups: Sequence[Iterable[Id]],
    ids: int | Iterable[Id],
    seeds: int | Sequence[int] = 3,
) -> GroupChanges:
    """Train on everything, and without each group, with every seed; how the target loss changes.

    Whether the weight of the examples that are left is 1/n or 1/(n - |S|) is up to the training: estimators of
    removal keep 1/n, which a mean loss with weight decay times n/(n - |S|) does, too.

    Args:
        retraining: How to train, and where to keep what was found. Several losses are averaged.
        groups: Ids of the examples to leave out, such as `neighbour_groups` gives.
        ids: Ids of all training examples, or their number.
        seeds: Seeds, or their number.

    Raises:
        ValueError: If there is no group, one is empty, everything, or holds an unknown or repeated id (before any
            training); and as `Retraining.losses`.

    >>> retraining = Retraining(lambda ids, seed: 1 / len(ids), progress=False)
    >>> leave_group_out(retraining, [[0], [1, 2]], ids=4, seeds=2).mean
    tensor([0.0833, 0.2500], dtype=torch.float64)
    """
    everything = tuple(range(ids)) if isinstance(ids, int) else _ids(ids)
    left_out = tuple(plain_ids(group) for group in groups)
    _check_groups(left_out, everything)
    numbers = seed_numbers("leave_group_out", seeds)
    rests = [tuple(name for name in everything if name not in out) for out in map(set, left_out)]
    losses = retraining.losses([everything, *rests], numbers).mean(2)
    return GroupChanges(left_out, tuple(numbers), losses[0], losses[1:])


def _ids(ids: Iterable[Id]) -> tuple[Id, ...]:
    names = plain_ids(ids)
    return check_ids("leave_group_out", names, len(names))


def _check_groups(groups: Sequence[tuple[Id, ...]], everything: tuple[Id, ...]) -> None:
    if not groups:
        raise ValueError("`leave_group_out(groups)`: expected at least one group.")
    known = set(everything)
    for number, group in enumerate(groups):
        odd = [name for name in group if name not in known]
        if odd or len(set(group)) < len(group) or not 0 < len(group) < len(everything):
            wrong = f"unknown {few(odd)}" if odd else few(list(group)) if group else "none"
            raise ValueError(
                f"`leave_group_out(groups)`: expected some of the {len(everything)} training examples, each once, and "
                f"not all of them. Group {number} has {wrong}."
            )
