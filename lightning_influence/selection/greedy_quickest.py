"""The picks of Algorithm 1 by whichever of its two exact ways is the quicker on the pool at hand."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from time import perf_counter

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.greedy_plain import plain_fill
from lightning_influence.selection.greedy_search import GreedySearch

_SHORT = 1.0  # seconds that the plain way may take before another is looked for
_TRIAL = 0.5  # seconds after which the other way is held against it, again and again


def quickest_fill(pool: Factors, admission: Admission) -> Iterator[int]:
    """Takes rows of an admission and gives out their numbers.

    The first picks are made plainly, which tells how long one takes. Where all of them would take more than a moment,
    `GreedySearch` goes on, for as long as its picks take less time than plain ones: that depends on how many rows its
    bounds spare, which nobody knows beforehand. Both make the same picks, so that time decides about nothing else.
    """
    plain = plain_fill(pool, admission)
    steps: list[float] = []
    for _ in range(3):
        began = perf_counter()
        row = next(plain, None)
        if row is None:
            return
        steps.append(perf_counter() - began)
        yield row
    step = min(steps[1:])  # before the first pick there is work that is done once
    if step * (admission.most - len(admission.picks)) > _SHORT:
        yield from _searched(pool, admission, step)
        plain = plain_fill(pool, admission, tuple(admission.picks))
    yield from plain


def _searched(pool: Factors, admission: Admission, step: float) -> Iterator[int]:
    """Picks of `GreedySearch` until there are no more, or they take longer than ``step`` seconds each."""
    told = len(admission.picks)
    picks = islice(GreedySearch(pool, pool.id_ranks).fill(admission), told, None)
    began, before = perf_counter(), told
    for row in picks:
        told += 1
        yield row
        spent, made = perf_counter() - began, len(admission.picks) - before
        if spent > _TRIAL:
            if spent > step * made:
                yield from admission.picks[told:]  # of a round that is not told to its end
                return
            began, before = perf_counter(), len(admission.picks)
