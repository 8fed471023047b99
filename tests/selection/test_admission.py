from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.admission import Admission
from tests import oracles


def pool(values: list[float], features: list[list[float]] | None = None) -> Factors:
    table = None if features is None else torch.tensor(features)
    return Factors.checked("test", torch.tensor(values), table)


@st.composite
def problems(draw: st.DrawFn) -> dict:
    n = draw(st.integers(1, 7))
    numbers = st.lists(st.integers(1, 5), min_size=n, max_size=n)
    groups = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    allowed = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    counts = [sum(a and g == k for a, g in zip(allowed, groups, strict=True)) for k in range(3)]
    low = [draw(st.integers(0, count)) for count in counts]
    high = [draw(st.integers(least, n)) for least in low]
    sizes = draw(st.none() | numbers)
    some = [k for k in range(n) if allowed[k]]
    first = draw(st.lists(st.sampled_from(some), unique=True, max_size=2))
    room = draw(st.integers(1, n if sizes is None else sum(sizes)))
    return {
        "sizes": sizes,
        "groups": groups,
        "low": low,
        "high": high,
        "allowed": allowed,
        "first": first,
        "room": room,
    }


def complete_selections(p: dict) -> list[set[int]]:
    """Every subset that meets all of it; with a budget in rows, those that fill it."""
    found = []
    some = [k for k, good in enumerate(p["allowed"]) if good]
    for size in range(len(some) + 1):
        for rows in itertools.combinations(some, size):
            counts = [sum(p["groups"][row] == k for row in rows) for k in range(3)]
            within = all(a <= c <= b for a, c, b in zip(p["low"], counts, p["high"], strict=True))
            fits = size == p["room"] if p["sizes"] is None else sum(p["sizes"][row] for row in rows) <= p["room"]
            if within and fits and set(p["first"]) <= set(rows):
                found.append(set(rows))
    return found


def admission(p: dict, values: Factors) -> Admission:
    return Admission(
        values,
        torch.tensor(p["allowed"]),
        p["room"],
        sizes=None if p["sizes"] is None else torch.tensor(p["sizes"]),
        groups=torch.tensor(p["groups"]),
        minimum=torch.tensor(p["low"]),
        maximum=torch.tensor(p["high"]),
        first=p["first"],
    )


@given(p=problems(), data=st.data())
def test_open_is_what_leaves_a_complete_selection_within_reach(p: dict, data: st.DataObject) -> None:
    complete = complete_selections(p)
    if not complete:
        return
    found = admission(p, pool([0.0] * len(p["groups"])))
    while found.more:
        rows = found.open.nonzero().flatten().tolist()
        done = len(found.picks)
        assert rows == ([p["first"][done]] if done < len(p["first"]) else oracles.open_rows(found.picks, complete))
        assert all(found.is_open(row) == (row in rows) for row in range(len(p["groups"])))
        assert found.take(data.draw(st.sampled_from(rows)))
    assert set(found.picks) in complete
    assert oracles.open_rows(found.picks, complete) == []
    assert not found.short
    assert len(found.picks) <= found.most


@given(p=problems(), data=st.data())
def test_what_is_closed_stays_closed(p: dict, data: st.DataObject) -> None:
    if not complete_selections(p):
        return
    found = admission(p, pool([0.0] * len(p["groups"])))
    found.take_first()
    before = found.open.clone()
    while found.more:
        found.take(data.draw(st.sampled_from(found.open.nonzero().flatten().tolist())))
        assert not (found.open & ~before).any()
        before = found.open.clone()


@given(p=problems())
def test_slack_is_negative_just_when_there_is_too_little_room(p: dict) -> None:
    required = [sum(p["groups"][row] == k for row in p["first"]) for k in range(3)]
    if any(r > b for r, b in zip(required, p["high"], strict=True)):
        return  # refused before an admission is made
    roomy = {**p, "room": 10**6, "sizes": p["sizes"] or [1] * len(p["groups"])}
    least = min(sum(roomy["sizes"][row] for row in rows) for rows in complete_selections(roomy))
    assert (admission(p, pool([0.0] * len(p["groups"]))).slack < 0) == (least > p["room"])


@given(p=problems(), data=st.data())
def test_rows_that_can_be_spared(p: dict, data: st.DataObject) -> None:
    """In rows just those without which a complete selection is left; in tokens none that closes a row or the rest."""
    complete = complete_selections(p)
    if not complete:
        return
    whole = admission(p, pool([0.0] * len(p["groups"])))
    optional = [row for row in oracles.open_rows(p["first"], complete) if row not in p["first"]]
    assert whole.optional.nonzero().flatten().tolist() == optional
    order = data.draw(st.permutations(optional).map(lambda rows: rows[: data.draw(st.integers(0, len(rows)))]))
    gone = whole.spared(order)
    assert gone == [row for row in order if row in gone]
    if p["sizes"] is None:
        expected: list[int] = []
        for row in order:
            if any(not rows & {*expected, row} for rows in complete):
                expected.append(row)
        assert gone == expected
    left = {**p, "allowed": [good and row not in gone for row, good in enumerate(p["allowed"])]}
    rest = admission(left, pool([0.0] * len(p["groups"])))
    assert rest.optional.nonzero().flatten().tolist() == [row for row in optional if row not in gone]
    sizes = p["sizes"] or [1] * len(p["groups"])
    spent = sum(sizes[row] for row in p["first"])
    assert reached(p, sizes, left, gone) >= min(p["room"] - spent, reached(p, sizes, p, []))


def reached(p: dict, sizes: list[int], left: dict, gone: list[int]) -> int:
    """What the smallest optional rows come to, as many of each source as it may have."""
    complete, total = complete_selections(p), 0
    for k in range(3):
        rows = [row for row in oracles.open_rows(p["first"], complete) if p["groups"][row] == k and row not in gone]
        spare = p["high"][k] - sum(p["groups"][row] == k for row in p["first"])
        total += sum(sorted(sizes[row] for row in rows if left["allowed"][row])[:spare])
    return total


def test_a_source_keeps_the_last_ones_of_its_minimum_and_a_maximum_spares_more() -> None:
    rows, groups = pool([0.0] * 7), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    quotas = {"minimum": torch.tensor([2, 0]), "maximum": torch.tensor([3, 1])}
    found = Admission(rows, torch.ones(7).bool(), 3, groups=groups, **quotas)
    assert found.spared([2, 0, 1, 6, 5, 4, 3]) == [2, 6, 5, 4]
    counted = Admission(rows, torch.ones(7).bool(), 9, sizes=torch.tensor([2, 9, 3, 1, 1, 1, 8]))
    assert counted.spared(range(7)) == [0, 1, 2, 3, 4]  # 1 and 8 are left for 9


def test_a_walk_passes_over_what_does_not_fit() -> None:
    found = Admission(pool([0.0] * 5), torch.ones(5).bool(), 7, sizes=torch.tensor([4, 5, 2, 1, 1]))
    found.walk(range(5))
    assert found.picks == [0, 2, 3]
    assert not found.more


def test_rows_that_come_first_are_taken_by_a_walk_too() -> None:
    found = Admission(pool([0.0] * 4), torch.ones(4).bool(), 3, first=[3, 1])
    assert [found.is_open(row) for row in range(4)] == [False, False, False, True]
    found.walk(range(4))
    assert found.picks == [3, 1, 0]


def test_it_stops_before_the_first_row_that_does_harm() -> None:
    """Row 2 alone would help; beside row 0 it does harm."""
    rows = pool([2.0, 1.0, 1.0, -1.0], [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    found = Admission(rows, torch.ones(4).bool(), 4, stops=True)
    found.walk([0, 1, 2, 3])
    assert found.picks == [0, 1]
    assert not found.short


def test_a_row_that_changes_nothing_does_not_stop_it() -> None:
    found = Admission(pool([1.0, 0.0, -1.0]), torch.ones(3).bool(), 3, stops=True)
    found.walk([0, 1, 2])
    assert found.picks == [0, 1]


def test_minimums_are_met_after_the_stop() -> None:
    groups, minimum, maximum = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1]), torch.tensor([4, 4])
    options = {"groups": groups, "minimum": minimum, "maximum": maximum, "stops": True}
    found = Admission(pool([1.0, -1.0, -2.0, -3.0]), torch.ones(4).bool(), 4, **options)
    found.walk([0, 1, 2, 3])
    assert found.picks == [0, 2]
    assert not found.short


def test_rows_that_come_first_do_not_stop_it() -> None:
    found = Admission(pool([1.0, -1.0, -2.0]), torch.ones(3).bool(), 3, first=[2], stops=True)
    found.walk([0, 1, 2])
    assert found.picks == [2, 0]


def test_a_gain_of_the_rule_itself_counts() -> None:
    found = Admission(pool([1.0, 1.0]), torch.ones(2).bool(), 2, stops=True)
    assert found.take(0, -0.1)
    assert not found.take(1, 0.1)
    assert not found.more


def test_gains_per_cost() -> None:
    found = Admission(pool([0.0] * 3), torch.ones(3).bool(), 3, costs=torch.tensor([1.0, 2.0, 4.0]))
    assert found.per_cost(torch.tensor([1.0, 1.0, -1.0])).tolist() == [4.0, 2.0, -1.0]
    assert found.error_per_cost(torch.ones(3)).tolist() == [4.0, 2.0, 1.0]
    free = Admission.of_rows(pool([0.0] * 3), 2)
    assert free.per_cost(torch.tensor([1.0, -1.0])).tolist() == [1.0, -1.0]
    assert free.error_per_cost(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]


def test_a_row_that_is_not_open_is_a_bug() -> None:
    found = Admission.of_rows(pool([0.0, 0.0]), 1)
    found.take(0)
    with pytest.raises(AssertionError):
        found.take(1)
