"""Algorithm 1 word for word: every row is evaluated for every pick."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.greedy_ties import ROUNDING, magnitudes, metric_size, smallest


def plain_picks(pool: Factors, budget: int, before: Sequence[int] = ()) -> Iterator[int]:
    """Row numbers of the next ``budget`` picks of [IA] section 3.2, by one blocked product F (M U) for each.

    The reference of `InteractionGreedy`, and the quicker way for pools of a few rows.

    Args:
        pool: With features.
        budget: Number of picks; with those before, no more than there are rows.
        before: Rows that were picked already, in order.
    """
    norms, size = pool.norms(), metric_size(pool)
    alone = 0.5 * pool.self_interactions() - pool.values  # q_j − b_j; infinite once j is picked
    errors = magnitudes(pool.values, norms, size)
    chosen = pool.shift(before)
    alone[list(before)] = torch.inf
    for _ in range(budget):
        direction = pool.lift(chosen)
        scores = alone + pool.products(direction)
        pick = smallest(scores, ROUNDING * (errors + norms * direction.norm()), pool.id_ranks)
        yield pick
        alone[pick] = torch.inf
        chosen = chosen + pool.shift([pick])
