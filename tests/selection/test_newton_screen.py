"""Rows that the others contradict, left out of pools with constraints: by trying all subsets what may be left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.selection import Constraints, Newton, NewtonGreedy, NewtonPool, TokenBudget
from tests import oracles
from tests.curvature.models import normal
from tests.selection.constraint_cases import Problem, problems


def known(problem: Problem) -> NewtonPool:
    """The problem's pool, in which rows are equal if their features are; every other row is turned round."""
    pool = problem.pool
    signs = torch.tensor([1.0 - 2 * (k % 2) for k in range(len(pool.ids))]).double()
    turned = pool.features * signs[:, None] if problem.duplicates == "allow" else pool.features
    problem.pool = type(pool)(torch.zeros_like(pool.values), turned, None, pool.ids)
    return NewtonPool(turned, torch.ones(1, turned.shape[1]).double(), ids=pool.ids)


@given(problem=problems())
def test_what_is_screened_leaves_every_constraint_in_reach(problem: Problem) -> None:
    pool = known(problem)
    budget: Any = TokenBudget(problem.budget, counts=problem.tokens) if problem.in_tokens else problem.budget
    complete = problem.complete()
    if not complete:
        with pytest.raises(ValueError, match=r"^`(NewtonPool.select|Constraints)"):
            pool.select(budget, Newton(0.5), constraints=problem.constraints())
        return
    limits = problem.constraints()
    gone, found = pool.opposed(budget, limits).tolist(), pool.select(budget, Newton(0.5), constraints=limits)
    left = [rows for rows in complete if not rows & set(gone)]
    assert set(found.positions) in left
    assert list(found.positions[: len(problem.first)]) == problem.required
    assert not oracles.open_rows(list(found.positions), left)
    assert found.ids == tuple(problem.pool.ids[row] for row in found.positions)
    assert (found.screened, found.pool_size) == (len(gone), len(problem.pool.ids) - len(gone))
    order, names = pool.agreement(), problem.pool.ids
    optional = [row for row in oracles.open_rows(problem.required, complete) if row not in problem.required]
    number = round(1.5 * sum(float(order[row]) < 0 for row in optional))
    ranked = sorted(optional, key=lambda row: (float(order[row]), names[row]))[:number]
    assert gone == [row for row in ranked if row in gone]
    if not problem.in_tokens:  # as many as can be
        expected: list[int] = []
        for row in ranked:
            if any(not rows & {*expected, row} for rows in complete):
                expected.append(row)
        assert gone == expected
    assert pool.screened(budget, limits).ids == [name for row, name in enumerate(names) if row not in gone]


@given(problem=problems(), screen=st.booleans())
def test_rows_are_chosen_greedily_among_the_others(problem: Problem, screen: bool) -> None:
    """The dense Newton step, tried for every row that a complete selection of the rest has; ridge of the rest."""
    pool = known(problem)
    budget: Any = TokenBudget(problem.budget, counts=problem.tokens) if problem.in_tokens else problem.budget
    complete = problem.complete()
    if not complete:
        return
    found = pool.select(budget, Newton(0.5, screen=screen), constraints=problem.constraints())
    gone = set(pool.opposed(budget, problem.constraints()).tolist()) if screen else set()
    rest = [row for row in range(len(problem.pool.ids)) if row not in gone]
    damping = oracles.newton_damping(pool.features[rest], 0.5)
    values, metric = pool.features @ pool.targets.mean(0), pool.targets.T @ pool.targets

    def score(picks: list[int], row: int) -> float:
        before, after = (
            oracles.newton_objective(values, pool.features, metric, p, damping) for p in (picks, [*picks, row])
        )
        change = after - before
        return change / problem.costs[problem.pool.ids[row]] if problem.costs and change < -1e-12 else change

    left = [rows for rows in complete if not rows & gone]
    truth = oracles.greedy_within(score, problem.pool.ids, left, problem.required, 1e-10)
    assert list(found.positions) == truth


def contradicted(n: int, wrong: int) -> NewtonPool:
    """Rows near a few directions, some of the first ones turned round."""
    signs = torch.ones(n).double()
    signs[:wrong] = -1
    directions = normal(4, 16)
    rows = directions.repeat(n // 4, 1) + 0.1 * normal(n, 16, seed=1)
    return NewtonPool(rows * signs[:, None], directions)


def test_wrong_rows_are_taken_where_they_must_be() -> None:
    pool, sources = contradicted(40, wrong=6), ["wrong"] * 6 + ["right"] * 34
    assert not set(pool.select(34).positions) & set(range(6))
    included = pool.select(20, constraints=Constraints(must_include=[3, 1]))
    assert included.ids[:2] == (3, 1)
    assert set(included.ids) & set(range(6)) == {1, 3}
    assert included.screened == round(1.5 * 4)
    least = pool.select(20, constraints=Constraints(sources=sources, min_per_source=2))
    kept = set(pool.agreement()[:6].argsort().tolist()[-2:])
    assert set(least.ids) & set(range(6)) == kept
    most = pool.select(20, constraints=Constraints(sources=sources, max_per_source={"wrong": 3, "right": 20}))
    assert not set(most.ids) & set(range(6))  # a source that is gone may be named
    assert not set(pool.select(20, constraints=Constraints(exclude=range(20, 30))).ids) & set(range(20, 30))


def test_a_budget_in_tokens_can_still_be_spent() -> None:
    pool = contradicted(40, wrong=6)
    counts = [10] * 6 + [1] * 34
    for tokens, screened in ((30, 9), (34, 6), (0.5, 7)):  # 94 in all; for 47 two wrong rows stay
        found = pool.select(TokenBudget(tokens, counts=counts))
        spent = sum(counts[row] for row in found.ids)
        room = tokens if isinstance(tokens, int) else 47
        assert room - 9 <= spent <= room
        assert found.screened == screened
    assert not set(pool.select(TokenBudget(30, counts=counts)).ids) & set(range(6))
    with pytest.raises(ValueError, match=r"`NewtonPool.select\(budget=.*expected counts, the tokens of each row"):
        pool.select(TokenBudget(30))


def test_the_twin_of_a_row_that_is_left_out_does_not_take_its_place() -> None:
    pool = contradicted(40, wrong=6)
    twice = NewtonPool(torch.cat([pool.features, pool.features[:6]]), pool.targets)
    found = twice.select(30, constraints=Constraints(duplicates="first"))
    assert not set(found.ids) & {*range(6), *range(40, 46)}


def test_it_may_stop_before_the_budget() -> None:
    pool = contradicted(40, wrong=6)
    stops = Constraints(stop_if_negative_gain=True)
    whole = pool.select(30)
    found = pool.select(30, constraints=stops)
    assert found.ids == whole.ids[: len(found)]
    assert (found.gains <= 0).all()
    assert found.screened == whole.screened


def test_rows_without_any_gradient() -> None:
    """There is no scale for a ridge, and nothing contradicts anything."""
    pool = NewtonPool(torch.zeros(6, 3).double(), torch.ones(2, 3).double())
    assert pool.agreement().tolist() == [0] * 6
    for rule in (Newton(), Newton("saturate", screen=True), NewtonGreedy()):
        found = pool.select(3, rule)
        assert (found.ids, found.screened, found.objective) == ((0, 1, 2), 0, 0)


@pytest.mark.parametrize("rule", [Newton(), Newton("saturate"), Newton(0.3), Newton("saturate", screen=True)])
@pytest.mark.parametrize(
    "constraints", [None, Constraints(must_include=["row 07"], max_per_source=9, sources=lambda k: k[-1:] > "4")]
)
def test_a_permuted_pool_gives_the_same_ids(rule: Newton, constraints: Constraints | None) -> None:
    """What is drawn at random is drawn by id."""
    pool, ids = contradicted(40, wrong=6), [f"row {k:02}" for k in range(40)]
    unseen = normal(40, seed=3).square()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    one = NewtonPool(pool.features, pool.targets, unseen=unseen, ids=ids)
    other = NewtonPool(pool.features[order], pool.targets, unseen=unseen[order], ids=[ids[k] for k in order])
    torch.testing.assert_close(one.ridge(9).errors, other.ridge(9).errors)
    found, again = one.select(12, rule, constraints=constraints), other.select(12, rule, constraints=constraints)
    assert found.ids == again.ids
    assert [order[k] for k in again.positions] == list(found.positions)
    assert (found.rule, found.screened) == (again.rule, again.screened)
