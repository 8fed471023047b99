"""The control group: rows drawn without looking at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.base import SelectionRule


@dataclass(frozen=True)
class Random(SelectionRule):
    """A uniform draw without replacement; values and features only fill in the predicted gains.

    The draw is made among the sorted ids, so it does not depend on the order of the pool.

    Attributes:
        seed: Seed of the draw, 0 <= seed < 2⁶³; the global generator is left alone.

    Raises:
        ValueError: If the seed is not such an int.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"`Random(seed={self.seed!r})`: expected an int with 0 <= seed < 2**63.")

    def _pick(self, pool: Factors, budget: int) -> Sequence[int]:
        draw = torch.randperm(len(pool), generator=torch.Generator().manual_seed(self.seed))
        picks: list[int] = pool.id_ranks.cpu().argsort()[draw[:budget]].tolist()
        return picks
