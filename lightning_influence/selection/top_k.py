"""Additive influence: the rows with the largest values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.base import SelectionRule


@dataclass(frozen=True)
class TopK(SelectionRule):
    """The k largest values b, as if the rows did not interact; equal values by id.

    Features, when given, do not change the picks; they fill in the interaction part of the result.

    >>> import torch
    >>> TopK().select(torch.tensor([0.1, 0.3, 0.2]), budget=2).ids
    (1, 2)
    """

    def _pick(self, pool: Factors, budget: int) -> Sequence[int]:
        by_id = pool.id_ranks.argsort()
        order = pool.values[by_id].argsort(descending=True, stable=True)
        picks: list[int] = by_id[order[:budget]].tolist()
        return picks
