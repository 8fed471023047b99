"""The contract of a selection rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import Tensor

from lightning_influence.capture.contexts import full_precision
from lightning_influence.estimators.factors import Factors, Id
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.budget import Budget, TokenBudget, resolve_budget
from lightning_influence.selection.constraints import Constraints
from lightning_influence.selection.row_data import check_positions
from lightning_influence.selection.selection import Selection


class SelectionRule(ABC):
    """Chooses rows of a pool. A member says which rows, in which order; the gains are computed here for all.

    Laws: the picks are as many as the budget says and unique; inputs stay untouched; ties go to the smaller id, so
    that a permuted pool gives the same ids; the first picks of a larger budget are those of a smaller one, unless
    `Constraints` or a budget in tokens look ahead, or the rule says that it looks at the budget (`StochasticGreedy`).

    Attributes:
        weighs_costs: Whether rows are compared by gains, which can be taken per cost.
    """

    weighs_costs: ClassVar[bool] = False

    @property
    def known_rows(self) -> int:
        """For how many rows, by position, a member brings data of its own; 0 where it has none, or has ids for it."""
        return 0

    @full_precision()
    def select(
        self,
        values: Tensor,
        features: Tensor | None = None,
        metric: Tensor | None = None,
        *,
        budget: Budget,
        ids: Iterable[Id] | None = None,
        constraints: Constraints | None = None,
    ) -> Selection:
        """Chooses ``budget`` rows and predicts what adding them does to the target loss.

        Args:
            values: First-order influence b [n]; b_j > 0: adding row j lowers the target loss.
            features: F [n, r] with interactions K = F M Fᵀ, any float dtype; None: no interactions.
            metric: M [r, r], symmetric, not necessarily definite; the identity when None.
            budget: Number of rows (int >= 1), share of the pool (float in (0, 1]), or `TokenBudget`.
            ids: One id per row, all int or all str; row numbers by default.
            constraints: What the selection must keep to besides.

        Raises:
            ValueError: If the pool is empty, the budget does not fit it, shapes do not fit, ids repeat, a number is
                NaN or infinite (the ids are named), the metric is not symmetric, no selection can meet the
                constraints, there are costs and the rule compares no gains, or data by position is of more rows than
                these.
        """
        call = f"{self!r}.select"
        pool = Factors.checked(call, values, features, metric, ids)
        if ids is None:
            check_positions(call, self.known_rows, len(pool))
        if constraints is None and not isinstance(budget, TokenBudget):
            rows = self._pick(pool, resolve_budget(budget, len(pool), call))
        else:
            rows = self._pick_within(call, pool, budget, Constraints() if constraints is None else constraints)
        return selection_of(pool, rows, repr(self), self._parts(pool, rows))

    def admission(self, call: str, pool: Factors, budget: Budget, constraints: Constraints) -> Admission:
        """What this rule may pick of a pool; refuses what no selection can meet (`Constraints.admission`)."""
        if constraints.costs is not None and not self.weighs_costs:
            raise ValueError(f"`{call}(constraints)`: {self!r} compares no gains. Expected constraints without costs.")
        return constraints.admission(call, pool, budget)

    def _pick_within(self, call: str, pool: Factors, budget: Budget, constraints: Constraints) -> Sequence[int]:
        admission = self.admission(call, pool, budget, constraints)
        self._fill(pool, admission)
        assert not admission.short, "a rule stopped while rows could be picked"
        return admission.picks

    def _fill(self, pool: Factors, admission: Admission) -> None:
        """Takes rows of the admission until it has no more.

        As it stands, right for members whose picks are a ranking of the pool; one that looks at the rows chosen so far
        is a `FillingRule`. Without constraints it picks as `_pick`.
        """
        admission.walk(self._pick(pool, len(pool)))

    @abstractmethod
    def _pick(self, pool: Factors, budget: int) -> Sequence[int]:
        """Row numbers of ``budget`` picks, in pick order; 1 <= budget <= len(pool)."""

    def _parts(self, pool: Factors, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The two parts [k] of each pick's gain, in pick order; a member with an estimate of its own overrides it."""
        return pool.in_order(rows)


def selection_of(pool: Factors, rows: Sequence[int], rule: str, parts: tuple[Tensor, Tensor]) -> Selection:
    """Rows picked in that order, with the first-order and the interaction part [k] of their gains."""
    first_order, interaction = (part.cpu() for part in parts)
    gains = first_order + interaction
    return Selection(
        ids=tuple(pool.ids[row] for row in rows),
        positions=tuple(rows),
        gains=gains,
        first_order=first_order,
        interaction=interaction,
        budget=len(rows),
        objective=float(gains.sum()),
        rule=rule,
        pool_size=len(pool),
    )


def check_pool(call: str, pool: Factors, selection: Selection) -> None:
    """Raises ValueError unless the selection is one of that pool and its objective that of `Factors`."""
    if len(pool) != selection.pool_size:
        raise ValueError(
            f"`{call}(values)`: expected the pool of the selection, with {selection.pool_size} rows. Got {len(pool)}."
        )
    if any(pool.ids[row] != name for row, name in zip(selection.positions, selection.ids, strict=True)):
        raise ValueError(f"`{call}(ids)`: expected the ids of the pool of the selection, in the same order.")
    first_order, interaction = pool.in_order(selection.positions)
    size = float(first_order.abs().sum() + interaction.abs().sum())
    objective = float((first_order + interaction).sum())
    if abs(objective - selection.objective) > 1e-9 * size:
        raise ValueError(
            f"`{call}(selection)`: expected an objective of −Σ b + ½ UᵀMU, which is {objective:.6g} for these rows, "
            f"values, features and metric. Got {selection.objective:.6g}: pass what the rule was given, at the same "
            "weight; rules with another estimate, such as NewtonGreedy, are not covered."
        )
