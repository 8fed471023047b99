"""Additive influence: the rows with the largest values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.base import SelectionRule


@dataclass(frozen=True)
class TopK(SelectionRule):
    """The k largest values b, as if the rows did not interact; equal values by id.

    Features, when given, do not change the picks; they fill in the interaction part of the result.

    >>> import torch
    >>> TopK().select(torch.tensor([0.1, 0.3, 0.2]), budget=2).ids
    (1, 2)
    """

    weighs_costs: ClassVar[bool] = True

    def _pick(self, pool: Factors, budget: int) -> Sequence[int]:
        return _ranking(pool, pool.values)[:budget]

    def _fill(self, pool: Factors, admission: Admission) -> None:
        admission.walk(_ranking(pool, admission.per_cost(pool.values)))


def _ranking(pool: Factors, values: Tensor) -> list[int]:
    by_id = pool.id_ranks.argsort()
    order: list[int] = by_id[values[by_id].argsort(descending=True, stable=True)].tolist()
    return order
