"""Algorithm 1 word for word: every row is evaluated for every pick."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.greedy_ties import ROUNDING, magnitudes, metric_size, smallest


def plain_picks(pool: Factors, budget: int, before: Sequence[int] = ()) -> Iterator[int]:
    """Row numbers of the next ``budget`` picks of [IA] section 3.2, by one blocked product F (M U) for each.

    The reference of `InteractionGreedy`, and the quicker way for pools of a few rows.

    Args:
        pool: With features.
        budget: Number of picks; with those before, no more than there are rows.
        before: Rows that were picked already, in order.
    """
    left = torch.ones_like(pool.values, dtype=torch.bool)
    left[list(before)] = False
    return plain_fill(pool, Admission(pool, left, budget), before)


def plain_fill(pool: Factors, admission: Admission, before: Sequence[int] = ()) -> Iterator[int]:
    """Row numbers of the picks within an admission, each taken before it is given out."""
    norms, size = pool.norms(), metric_size(pool)
    alone = 0.5 * pool.self_interactions() - pool.values  # q_j − b_j
    errors = magnitudes(pool.values, norms, size)
    chosen = pool.shift(before)
    direction = pool.lift(chosen) if pool.scales is None else pool.lifted(before).sum(dim=0)
    while admission.more:
        scores = -admission.per_cost(-(alone + pool.products(direction)))
        scores[~admission.open] = torch.inf
        off = admission.error_per_cost(ROUNDING * (errors + norms * direction.norm()))
        pick = smallest(scores, off, pool.id_ranks)
        if not admission.take(pick):
            continue
        yield pick
        if pool.scales is None:
            chosen = chosen + pool.shift([pick])
            direction = pool.lift(chosen)
        else:  # a row of K each, however wide F is
            direction = direction + pool.lifted([pick])[0]
