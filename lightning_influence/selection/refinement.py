"""Swapping picks for better rows until none is left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.capture.contexts import full_precision
from lightning_influence.estimators.factors import Factors, Id
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.base import check_pool, selection_of
from lightning_influence.selection.budget import TokenBudget
from lightning_influence.selection.constraints import Constraints
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
    constraints: Constraints | None = None,
    budget: TokenBudget | None = None,
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
        constraints: As given to the rule; every exchange keeps them. Costs play no part in it.
        budget: As given to the rule, where it was one in tokens.

    Returns:
        A selection of as many rows, in the places of those they replace. The first rows of it are not what a smaller
        budget would pick. A lower bound of the objective stays valid and is kept.

    Raises:
        ValueError: If pool and selection do not fit, there are no features, ``sweeps`` is no int >= 1, or the selection
            does not keep the constraints (a row that does not is named).
    """
    pool = Factors.checked("refine", values, features, metric, ids)
    if pool.features is None:
        raise ValueError("`refine(features=None)`: expected features [n, r]; rows that do not interact need no swaps.")
    if type(sweeps) is not int or sweeps < 1:
        raise ValueError(f"`refine(sweeps={sweeps!r})`: expected an int >= 1.")
    check_pool("refine", pool, selection)
    rows = list(selection.positions)
    limits = None
    if constraints is not None or budget is not None:
        limits = _limits(pool, selection, Constraints() if constraints is None else constraints, budget)
    swaps = _Swaps(pool, rows, limits)
    for _ in range(sweeps):
        if not sum(swaps.exchange(place) for place in range(len(rows))):
            break
    refined = selection_of(pool, swaps.rows, f"{selection.rule}, refined", pool.in_order(swaps.rows))
    better = refined if refined.objective < selection.objective else selection
    return better.certified(selection.lower_bound)


def _limits(pool: Factors, selection: Selection, constraints: Constraints, budget: TokenBudget | None) -> Admission:
    """The constraints on the pool, which the selection has to keep."""
    settled = replace(constraints, stop_if_negative_gain=False)
    limits = settled.admission("refine", pool, len(selection) if budget is None else budget)
    limits.take_first()
    required = set(limits.picks)
    for row in [row for row in selection.positions if row not in required]:
        if not limits.is_open(row):
            raise ValueError(
                f"`refine(constraints)`: expected a selection that keeps the constraints and the budget. The row of id "
                f"{pool.ids[row]!r} does not; pass what the rule was given."
            )
        limits.take(row)
    return limits


class _Swaps:
    """The chosen rows, with U of all of them."""

    def __init__(self, pool: Factors, rows: list[int], limits: Admission | None) -> None:
        self.rows, self._limits = rows, limits
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
        free = self._outside if self._limits is None else self._outside & self._limits.exchangeable(self.rows, place)
        high = torch.where(free, scores + errors, torch.inf)
        new = int(high.argmin())
        if not high[new] < scores[old] - errors[old]:
            return False
        self.rows[place] = new
        self._outside[old], self._outside[new] = True, False
        return True
