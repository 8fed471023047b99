"""What the rules have in common that take rows one after the other, each in view of those before it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.base import SelectionRule


class FillingRule(SelectionRule):
    """Takes the best of the rows that an `Admission` has open, again and again: the same code with constraints or not.

    Members say how (`_fill`). They compare gains, which may be taken per cost, unless they say otherwise.
    """

    weighs_costs: ClassVar[bool] = True

    def _pick(self, pool: Factors, budget: int) -> Sequence[int]:
        admission = Admission.of_rows(pool, budget)
        self._fill(pool, admission)
        return admission.picks

    @abstractmethod
    def _fill(self, pool: Factors, admission: Admission) -> None:
        """Takes rows of the admission until it has no more."""
