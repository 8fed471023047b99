from __future__ import annotations

import pytest
import torch

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection import Constraints, TokenBudget
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.filling_rule import FillingRule


class FromTheEnd(FillingRule):
    """The last row that is open."""

    def __repr__(self) -> str:
        return "FromTheEnd()"

    def _fill(self, pool: Factors, admission: Admission) -> None:
        while admission.more:
            admission.take(int(admission.open.nonzero()[-1]))


@pytest.mark.parametrize("constraints", [None, Constraints()])
def test_rows_of_a_plain_budget(constraints: Constraints | None) -> None:
    assert FromTheEnd().select(torch.zeros(6), budget=3, constraints=constraints).ids == (5, 4, 3)


def test_within_constraints_and_tokens() -> None:
    within = Constraints(must_include=[2], exclude=[5], costs=[1.0] * 6)
    assert FromTheEnd().select(torch.zeros(6), budget=3, constraints=within).ids == (2, 4, 3)
    tokens = TokenBudget(5, counts=[9, 1, 1, 2, 2, 9])
    assert FromTheEnd().select(torch.zeros(6), budget=tokens).ids == (4, 3, 2)
