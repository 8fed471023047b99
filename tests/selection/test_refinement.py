from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.selection import (
    Constraints,
    InteractionGreedy,
    Random,
    Selection,
    TokenBudget,
    TopK,
    certify,
    refine,
)
from tests import oracles
from tests.selection.cases import Pool, clustered_pool, pools


def refined(selection: Selection, pool: Pool, sweeps: int = 20) -> Selection:
    return refine(selection, pool.values, pool.features, pool.metric, ids=pool.ids, sweeps=sweeps)


def chosen(pool: Pool, budget: int, rule: Random | InteractionGreedy | TopK) -> Selection:
    return rule.select(pool.values, pool.features, pool.metric, budget=budget, ids=pool.ids)


@settings(deadline=None, max_examples=30)
@given(pool=pools(), data=st.data())
def test_never_worse_and_no_single_swap_is_left(pool: Pool, data: st.DataObject) -> None:
    n = len(pool.ids)
    before = chosen(pool, data.draw(st.integers(1, n)), Random(data.draw(st.integers(0, 3))))
    after = refined(before, pool)
    assert after.objective <= before.objective
    assert len(set(after.ids)) == len(before) == len(after)
    interactions, rows = pool.interactions, list(after.positions)
    assert after.objective == pytest.approx(oracles.addition_objective(pool.values, interactions, rows), abs=1e-9)
    for place, other in itertools.product(range(len(rows)), sorted(set(range(n)) - set(rows))):
        swapped = [*rows[:place], other, *rows[place + 1 :]]
        assert oracles.addition_objective(pool.values, interactions, swapped) >= after.objective - 1e-9


def test_greedy_is_improved_where_its_first_pick_was_rash() -> None:
    features = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    values = torch.tensor([2.1, 1.5, 1.5])
    pool = Pool(values, features, None, (0, 1, 2))
    greedy = chosen(pool, 2, InteractionGreedy())
    assert 0 in greedy.ids
    better = refined(greedy, pool)
    assert sorted(better.ids) == [1, 2]
    assert better.objective < greedy.objective
    assert better.rule == "InteractionGreedy(), refined"


def test_a_certificate_stays_valid() -> None:
    pool = clustered_pool(40, 6)
    pool = Pool(pool.values / 20, pool.features, None, pool.ids)
    certified = certify(chosen(pool, 8, TopK()), pool.values, pool.features, ids=pool.ids)
    better = refined(certified, pool)
    assert better.objective < certified.objective
    assert better.lower_bound == certified.lower_bound
    assert 0 <= better.optimality_gap < certified.optimality_gap


def test_one_sweep_is_enough_to_leave_the_best_alone() -> None:
    pool = Pool(torch.tensor([3.0, 2.0, 1.0]), torch.eye(3), None, (0, 1, 2))
    greedy = chosen(pool, 2, InteractionGreedy())
    assert refined(greedy, pool, sweeps=1).to_dict() == greedy.to_dict()


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_no_swap_breaks_a_constraint_or_a_budget(data: st.DataObject) -> None:
    n, draw = 12, data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    pool = Pool(torch.randn(n, generator=generator), torch.randn(n, 3, generator=generator), None, tuple(range(n)))
    sources, sizes = [row % 3 for row in range(n)], [1 + row % 4 for row in range(n)]
    limits = Constraints(must_include=[4], exclude=[0, 7], sources=sources, min_per_source=1, max_per_source={1: 2})
    budget = draw(st.sampled_from([5, TokenBudget(14, counts=sizes)]))
    before = TopK().select(pool.values, pool.features, budget=budget, constraints=limits)
    tokens = budget if isinstance(budget, TokenBudget) else None
    parts = pool.values, pool.features
    after = refine(before, *parts, sweeps=9, constraints=limits, budget=tokens)
    assert after.objective <= before.objective

    def kept(rows: list[int]) -> bool:
        counts = [sum(sources[row] == source for row in rows) for source in range(3)]
        spent = sum(sizes[row] for row in rows) if tokens else 0
        return 4 in rows and not {0, 7} & set(rows) and min(counts) >= 1 and counts[1] <= 2 and spent <= 14

    rows = list(after.positions)
    assert kept(rows)
    for place, other in itertools.product(range(len(rows)), sorted(set(range(n)) - set(rows))):
        swapped = [*rows[:place], other, *rows[place + 1 :]]
        if kept(swapped):
            assert oracles.addition_objective(pool.values, pool.interactions, swapped) >= after.objective - 1e-9


def test_a_selection_that_breaks_the_constraints_is_refused() -> None:
    before = TopK().select(torch.arange(4.0), torch.eye(4), budget=2)
    with pytest.raises(ValueError, match=r"keeps the constraints and the budget. The row of id 3 does not"):
        refine(before, torch.arange(4.0), torch.eye(4), constraints=Constraints(exclude=[3]))


def test_bad_input() -> None:
    selection = TopK().select(torch.ones(3), budget=1)
    with pytest.raises(ValueError, match=r"`refine\(features=None\)`: expected features \[n, r\]"):
        refine(selection, torch.ones(3), None)
    with pytest.raises(ValueError, match=r"`refine\(sweeps=0\)`: expected an int >= 1"):
        refine(selection, torch.ones(3), torch.ones(3, 1), sweeps=0)
    with pytest.raises(ValueError, match=r"`refine\(values\)`: expected the pool of the selection, with 3 rows. Got 4"):
        refine(selection, torch.ones(4), torch.ones(4, 1))
