"""Swapping picks for better rows until none is left."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_influence.capture.contexts import full_precision
from lightning_influence.estimators.factors import Factors, Id
from lightning_influence.selection.base import check_pool, selection_of
from lightning_influence.selection.greedy_ties import ROUNDING, magnitudes, metric_size
from lightning_influence.selection.selection import Selection


@full_precision()
def refine(
    selection: Selection,
    values: Tensor,
    features: Tensor,
    metric: Tensor | None = None,
    *,
    ids: Iterable[Id] | None = None,
    sweeps: int = 3,
) -> Selection:
    """The selection with picks exchanged for rows outside that lower the objective more, one by one.

    Each sweep goes through the picks in order: pick i is replaced by the row j with the lowest marginal score given the
    k − 1 others (eq. 12 of [IA] section 3.2 for S without i), if that is lower than i's own by more than float64 may
    be off. So the objective never rises, and after a sweep without an exchange no single one would lower it. A sweep
    costs k picks of plain Algorithm 1.

    Args:
        selection: Of any rule.
        values: b [n], as given to the rule; b_j > 0: adding row j lowers the target loss.
        features: F [n, r], as given to the rule.
        metric: M [r, r], as given to the rule; not necessarily definite.
        ids: As given to the rule.
        sweeps: The most sweeps.

    Returns:
        A selection of as many rows, in the places of those they replace. The first rows of it are not what a smaller
        budget would pick. A lower bound of the objective stays valid and is kept.

    Raises:
        ValueError: If pool and selection do not fit, there are no features, or ``sweeps`` is no int >= 1.
    """
    pool = Factors.checked("refine", values, features, metric, ids)
    if pool.features is None:
        raise ValueError("`refine(features=None)`: expected features [n, r]; rows that do not interact need no swaps.")
    if type(sweeps) is not int or sweeps < 1:
        raise ValueError(f"`refine(sweeps={sweeps!r})`: expected an int >= 1.")
    check_pool("refine", pool, selection)
    rows = list(selection.positions)
    swaps = _Swaps(pool, rows)
    for _ in range(sweeps):
        if not sum(swaps.exchange(place) for place in range(len(rows))):
            break
    refined = selection_of(pool, swaps.rows, f"{selection.rule}, refined", pool.in_order(swaps.rows))
    better = refined if refined.objective < selection.objective else selection
    return better.certified(selection.lower_bound)


class _Swaps:
    """The chosen rows, with U of all of them."""

    def __init__(self, pool: Factors, rows: list[int]) -> None:
        self.rows = rows
        self._pool, self._norms, self._size = pool, pool.norms(), metric_size(pool)
        self._alone = 0.5 * pool.self_interactions() - pool.values
        self._errors = magnitudes(pool.values, self._norms, self._size)
        self._outside = torch.ones(len(pool), dtype=torch.bool, device=pool.values.device)
        self._outside[rows] = False

    def exchange(self, place: int) -> bool:
        """Whether another row takes that place."""
        old = self.rows[place]
        direction = self._pool.lift(self._pool.shift(self.rows[:place] + self.rows[place + 1 :]))
        scores = self._alone + self._pool.products(direction)
        errors = ROUNDING * (self._errors + self._norms * direction.norm())
        high = torch.where(self._outside, scores + errors, torch.inf)
        new = int(high.argmin())
        if not high[new] < scores[old] - errors[old]:
            return False
        self.rows[place] = new
        self._outside[old], self._outside[new] = True, False
        return True
