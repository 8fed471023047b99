from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
import torch

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection import greedy_quickest as module
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.greedy_plain import plain_fill
from tests.selection.cases import clustered_pool


class Watch:
    """A clock on which a plain pick and a pick of the search take as long as they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, plain: float, search: list[float]) -> None:
        self.now, self.plain_picks, self.search_picks = 0.0, 0, 0
        monkeypatch.setattr(module, "perf_counter", lambda: self.now)
        self._plain, self._search = plain, search
        plainly, searching = module.plain_fill, module.GreedySearch

        def slow_plain(pool: Factors, admission: Admission, before: tuple[int, ...] = ()) -> Iterator[int]:
            for row in plainly(pool, admission, before):
                self.now += self._plain
                self.plain_picks += 1
                yield row

        class SlowSearch(searching):  # type: ignore[misc, valid-type]
            def _round(inner, *arguments: object) -> object:
                made = super()._round(*arguments)
                self.now += len(made) * self._search[min(self.search_picks // 30, len(self._search) - 1)]
                self.search_picks += len(made)
                return made

        monkeypatch.setattr(module, "plain_fill", slow_plain)
        monkeypatch.setattr(module, "GreedySearch", SlowSearch)


def fill(budget: int) -> tuple[list[int], list[int], list[int]]:
    """What is given out, what is taken, and what the plain way takes."""
    pool = clustered_pool(400)
    factors = Factors.checked("test", pool.values, pool.features, pool.metric, pool.ids)
    admission, plain = Admission.of_rows(factors, budget), Admission.of_rows(factors, budget)
    given = list(module.quickest_fill(factors, admission))
    return given, admission.picks, list(plain_fill(factors, plain))


@pytest.mark.parametrize(
    ("plain", "search", "way"),
    [
        (1e-6, [1.0], "plain"),  # over in a moment
        (1.0, [0.1], "search"),
        (1.0, [2.0], "back"),
        (1.0, [0.1, 5.0], "back"),  # no longer worth it after a while
    ],
)
def test_the_picks_are_those_of_the_plain_way_whichever_is_taken(
    plain: float, search: list[float], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch, plain, search)
    given, taken, expected = fill(150)
    assert given == taken == expected
    assert watch.plain_picks == {"plain": 150, "search": 3}.get(way, watch.plain_picks)
    if way == "back":
        assert watch.search_picks > 0
        assert watch.plain_picks + watch.search_picks == 150
        assert (watch.search_picks >= 30) == (len(search) == 2)


def test_fewer_picks_than_it_takes_to_know() -> None:
    for budget in range(1, 6):
        given, taken, expected = fill(budget)
        assert given == taken == expected
        assert len(given) == budget


def test_a_round_that_is_not_told_to_its_end_is_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps while a round is being told."""
    times = count()
    monkeypatch.setattr(module, "perf_counter", lambda: float(next(times)))
    given, taken, expected = fill(150)
    assert given == taken == expected


def test_ties_go_to_the_smaller_id_on_both_sides_of_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    Watch(monkeypatch, 1.0, [0.1, 5.0])
    values, features = torch.ones(90), torch.eye(3).repeat(30, 1)
    factors = Factors.checked("test", values, features, None, list(range(90))[::-1])
    admission = Admission.of_rows(factors, 80)
    assert list(module.quickest_fill(factors, admission)) == list(plain_fill(factors, Admission.of_rows(factors, 80)))
