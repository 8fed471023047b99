"""Greedy selection among a few rows drawn anew for every pick: approximate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.greedy_rule import GreedyRule, Marginals
from lightning_influence.selection.greedy_ties import smallest


@dataclass(frozen=True)
class StochasticGreedy(GreedyRule):
    """`InteractionGreedy` that looks at a random sample for each pick instead of at all rows: approximate.

    Mirzasoleiman et al. 2015, "Lazier Than Lazy Greedy": each of the k picks is the best of
    ⌈(n / k) ln(1 / ε)⌉ of the remaining rows, drawn without replacement, so that about n ln(1 / ε) scores are
    evaluated in all, however large the budget. Their guarantee of 1 − 1/e − ε times the best gain, in expectation, is
    for monotone submodular gains, which these need not be. Scores themselves are exact.

    As the sample depends on the budget, a smaller budget does not pick the first rows of a larger one. k is the most
    rows that budget and constraints leave room for, n the rows that may be picked. Rows are drawn by their place among
    the sorted ids, so the order of the pool does not matter.

    >>> import torch
    >>> StochasticGreedy(epsilon=0.01).select(torch.tensor([1.0, 3.0, 2.0]), torch.eye(3), budget=1).ids
    (1,)

    Attributes:
        epsilon: ε in (0, 1): chance that a pick misses the rows a budget of this size ought to find.
        seed: Of the draws, 0 <= seed < 2⁶³; the global generators are left alone.

    Raises:
        ValueError: If ``epsilon`` or ``seed`` is out of range; from `select`, if there are no features.
    """

    epsilon: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.epsilon, float) or not 0 < self.epsilon < 1:
            raise ValueError(f"`StochasticGreedy(epsilon={self.epsilon!r})`: expected a number in (0, 1), such as 0.1.")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"`StochasticGreedy(seed={self.seed!r})`: expected an int with 0 <= seed < 2**63.")

    def _taken(self, pool: Factors, admission: Admission) -> Iterator[int]:
        marginals, generator = Marginals(pool), np.random.default_rng(self.seed)
        admission.take_first()
        for row in admission.picks:
            marginals.add(row)
            yield row
        order, closings = pool.id_ranks.argsort(), admission.closings
        left = order[admission.open[order]].cpu().numpy()
        size = math.ceil(len(left) / max(1, admission.most - len(admission.picks)) * math.log(1 / self.epsilon))
        while admission.more:
            places = generator.choice(len(left), min(size, len(left)), replace=False, shuffle=False)
            rows = torch.from_numpy(left[places]).to(order.device)
            best = smallest(*marginals.scores(rows, admission), pool.id_ranks[rows])
            row = int(rows[best])
            if admission.take(row):
                marginals.add(row)
                yield row
            if admission.closings > closings:
                closings, left = admission.closings, order[admission.open[order]].cpu().numpy()
            else:  # the last row moves to the place of the pick
                left[places[best]] = left[-1]
                left = left[:-1]
