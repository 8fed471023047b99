"""What the rules have in common that pick row after row by marginal scores with interactions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.filling_rule import FillingRule
from lightning_influence.selection.greedy_ties import ROUNDING, magnitudes, metric_size

_DELAY = 5.0  # seconds before a progress bar is shown


class GreedyRule(FillingRule):
    """Adds rows one by one, by what each is predicted to change given the rows before it ([IA] section 3.2, eq. 12).

    Members say how the next rows are found. Two rows whose scores float64 cannot tell apart (their rounding errors
    overlap) are tied, and the smaller id wins. All rows of the budget are picked even when late ones are predicted to
    raise the loss: read the gains. A progress bar appears after five seconds.
    """

    def _fill(self, pool: Factors, admission: Admission) -> None:
        if pool.features is None:
            raise ValueError(
                f"`{self!r}.select(features=None)`: expected features [n, r] with the interactions K = F M Fᵀ. "
                "Use `TopK()` to select by the values alone."
            )
        with tqdm(total=admission.most, desc=type(self).__name__, unit="row", delay=_DELAY, leave=False) as bar:
            for _ in self._taken(pool, admission):
                bar.update()

    @abstractmethod
    def _taken(self, pool: Factors, admission: Admission) -> Iterator[int]:
        """Takes rows of the admission until it has no more, and gives out their numbers."""


class Marginals:
    """Marginal scores of rows of a pool, evaluated where they are asked for.

    Args:
        pool: With features.
    """

    def __init__(self, pool: Factors) -> None:
        self._pool, self._norms, self._size = pool, pool.norms(), metric_size(pool)
        self._alone = 0.5 * pool.self_interactions() - pool.values
        self._errors = magnitudes(pool.values, self._norms, self._size)
        self._total = pool.shift([])

    def scores(self, rows: Tensor, admission: Admission) -> tuple[Tensor, Tensor]:
        """Scores [rows] given the picks so far, per cost, and by how much they may be off, float64."""
        direction = self._pool.lift(self._total)
        products = torch.cat([block @ direction for block in self._pool.blocks(rows)])
        errors = ROUNDING * (self._errors[rows] + self._norms[rows] * direction.norm())
        scores = -admission.per_cost(-(self._alone[rows] + products), rows)
        return scores, admission.error_per_cost(errors, rows)

    def add(self, row: int) -> None:
        """Adds a pick."""
        self._total = self._total + self._pool.shift([row])
