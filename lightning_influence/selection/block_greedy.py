"""Greedy selection that looks at all rows once for several picks: approximate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.greedy_rule import GreedyRule, Marginals
from lightning_influence.selection.greedy_ties import smallest

SHORTLIST = 8  # rows for each pick of a block


@dataclass(frozen=True)
class BlockGreedy(GreedyRule):
    """`InteractionGreedy` that evaluates all rows only once for a block of picks: approximate.

    The eight rows per pick of a block that have the best marginal scores at its start make a shortlist, and the picks
    of the block are the greedy choice among them, with the interactions of all rows chosen so far. So scores are
    exact; what is approximate is that a row outside the shortlist has to wait for the next block, even where it has
    become the best meanwhile. A block of one pick is `InteractionGreedy`. A pick after which constraints close other
    rows ends its block.

    >>> import torch
    >>> twins_and_a_loner = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> BlockGreedy(2).select(torch.tensor([2.0, 2.0, 1.5]), twins_and_a_loner, budget=2).ids
    (0, 2)

    Attributes:
        block: Picks for each pass over all rows, an int >= 1.

    Raises:
        ValueError: If ``block`` is no such int; from `select`, if there are no features.
    """

    block: int = 32

    def __post_init__(self) -> None:
        if type(self.block) is not int or self.block < 1:
            raise ValueError(f"`BlockGreedy(block={self.block!r})`: expected an int >= 1, such as 32.")

    def _taken(self, pool: Factors, admission: Admission) -> Iterator[int]:
        marginals = Marginals(pool)
        admission.take_first()
        for row in admission.picks:
            marginals.add(row)
            yield row
        while admission.more:
            rows, closings = self._shortlist(pool, marginals, admission), admission.closings
            for _ in range(min(self.block, len(rows))):
                best = smallest(*marginals.scores(rows, admission), pool.id_ranks[rows])
                row = int(rows[best])
                if admission.take(row):
                    marginals.add(row)
                    yield row
                if admission.closings > closings or not admission.more:
                    break
                rows = rows[rows != row]

    def _shortlist(self, pool: Factors, marginals: Marginals, admission: Admission) -> Tensor:
        """Row numbers of the best scores; of those that may be equal to the last of them, the smallest ids."""
        rows = admission.open.nonzero().flatten()
        count = min(SHORTLIST * self.block, len(rows))
        scores, errors = marginals.scores(rows, admission)
        last = int(scores.kthvalue(count).indices)
        better = scores + errors < scores[last] - errors[last]
        tied = (~better & (scores - errors <= scores[last] + errors[last])).nonzero().flatten()
        by_id = tied[pool.id_ranks[rows[tied]].argsort()]
        return torch.cat([rows[better], rows[by_id[: count - int(better.sum())]]])
