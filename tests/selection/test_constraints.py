from __future__ import annotations

import itertools
import re
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.selection import (
    BalancedRandom,
    Constraints,
    FacilityLocation,
    InteractionGreedy,
    NewtonGreedy,
    Random,
    RedundancyFilter,
    RoundRobin,
    SelectionRule,
    TokenBudget,
    TopK,
)
from tests import oracles
from tests.selection.constraint_cases import Problem, problems


def expected(problem: Problem, score: Any, rounding: float) -> tuple[int, ...] | None:
    complete = problem.complete()
    if not complete:
        return None
    return tuple(oracles.greedy_within(score, problem.pool.ids, complete, problem.required, rounding))


def check(problem: Problem, rule: SelectionRule, score: Any, rounding: float = 0) -> None:
    """The greedy choice among what leaves a complete selection within reach, or a refusal where there is none."""
    truth = expected(problem, score, rounding)
    if truth is None:
        with pytest.raises(ValueError, match=r"^`"):
            problem.select(rule)
    else:
        assert problem.select(rule) == truth


@given(problem=problems())
def test_additive_influence_is_greedy_within_the_constraints(problem: Problem) -> None:
    check(problem, TopK(), lambda _, row: problem.per_cost(-float(problem.pool.values[row]), row))


@given(problem=problems())
def test_interaction_aware_greedy_within_the_constraints(problem: Problem) -> None:
    table = problem.pool.interactions

    def score(picks: list[int], row: int) -> Fraction:
        before, after = (oracles.addition_objective(problem.pool.values, table, p) for p in (picks, [*picks, row]))
        return problem.per_cost(after - before, row)

    for method in ("pruned", "plain", "auto"):
        check(problem, InteractionGreedy(method), score)


@given(problem=problems())
def test_facility_location_within_the_constraints(problem: Problem) -> None:
    rows = torch.nn.functional.normalize(problem.pool.features)
    similar = (rows @ rows.T).clamp_min(0)

    def score(picks: list[int], row: int) -> Any:
        covered = similar[:, picks].amax(1) if picks else torch.zeros(len(rows))
        loss = -float((similar[:, row] - covered).clamp_min(0).sum())
        cost = problem.costs[problem.pool.ids[row]] if problem.costs else 1
        return loss / cost

    check(problem, FacilityLocation(), score, 1e-10)


@given(problem=problems())
def test_newton_greedy_within_the_constraints(problem: Problem) -> None:
    rule, pool = NewtonGreedy(0.5), problem.pool
    damping = oracles.newton_damping(pool.features, 0.5)

    def score(picks: list[int], row: int) -> float:
        rows = (picks, [*picks, row])
        before, after = (oracles.newton_objective(pool.values, pool.features, pool.metric, p, damping) for p in rows)
        change = after - before
        return change / problem.costs[pool.ids[row]] if problem.costs and change < -1e-12 else change

    check(problem, rule, score, 1e-10)


@given(problem=problems(costs=False))
def test_a_draw_within_the_constraints(problem: Problem) -> None:
    order = Random(3).select(problem.pool.values, budget=1.0, ids=problem.pool.ids).positions
    check(problem, Random(3), lambda _, row: order.index(row))


@given(problem=problems(), data=st.data())
def test_targets_take_turns_within_the_constraints(problem: Problem, data: st.DataObject) -> None:
    n = len(problem.pool.ids)
    numbers = st.lists(st.integers(-2, 2), min_size=n, max_size=n)
    table = data.draw(st.lists(numbers, min_size=1, max_size=3))

    def score(picks: list[int], row: int) -> Fraction:
        turn = (len(picks) - len(problem.first)) % len(table)
        return problem.per_cost(-table[turn][row], row)

    check(problem, RoundRobin(torch.tensor(table), problem.pool.ids), score)


@given(problem=problems(costs=False))
def test_sources_take_turns_within_the_constraints(problem: Problem) -> None:
    rule = BalancedRandom(problem.sources, seed=5)
    complete = problem.complete()
    if not complete:
        return
    picks = list(problem.select(rule))
    assert picks[: len(problem.first)] == problem.required
    assert set(picks) in complete
    assert not oracles.open_rows(picks, complete)
    drawn, free = picks[len(problem.first) :], not (problem.low or problem.high or problem.in_tokens)
    counts = Counter(problem.sources[problem.pool.ids[row]] for row in drawn)
    left = Counter(
        problem.sources[problem.pool.ids[row]] for row in problem.candidates() if row not in problem.required
    )
    for source, others in itertools.permutations(counts, 2):
        assert not free or counts[source] >= counts[others] - 1 or counts[source] == left[source]


@given(problem=problems(), data=st.data())
def test_a_permuted_pool_gives_the_same_ids(problem: Problem, data: st.DataObject) -> None:
    if not problem.complete():
        return
    order = data.draw(st.permutations(range(len(problem.pool.ids))))
    for rule in (TopK(), InteractionGreedy(), FacilityLocation(), NewtonGreedy()):
        names = [problem.pool.ids[row] for row in problem.select(rule)]
        whole = problem.pool
        problem.pool = whole.permuted(order)
        assert [problem.pool.ids[row] for row in problem.select(rule)] == names
        problem.pool = whole


@given(
    problem=problems(),
    rule=st.sampled_from([TopK(), InteractionGreedy(), InteractionGreedy("pruned"), FacilityLocation()]),
)
def test_prefix_without_minimums_and_tokens(problem: Problem, rule: SelectionRule) -> None:
    problem.in_tokens, problem.low = False, None
    found: tuple[int, ...] = ()
    for budget in range(1, len(problem.pool.ids) + 1):
        problem.budget = budget
        if problem.complete():
            larger = problem.select(rule)
            assert larger[: len(found)] == found
            found = larger


def test_minimums_and_budgets_in_tokens_look_ahead_to_the_end() -> None:
    """So the first picks of a larger budget are others."""
    values, wanted = torch.tensor([3.0, 2.0, 1.0]), Constraints(sources=["w", "w", "b"], min_per_source={"b": 1})
    assert TopK().select(values, budget=1, constraints=wanted).ids == (2,)
    assert TopK().select(values, budget=2, constraints=wanted).ids == (0, 2)
    counts = [5, 2, 2]
    assert TopK().select(values, budget=TokenBudget(4, counts=counts)).ids == (1, 2)
    assert TopK().select(values, budget=TokenBudget(6, counts=counts)).ids == (0,)


@given(
    problem=problems(), rule=st.sampled_from([TopK(), InteractionGreedy(), InteractionGreedy("pruned"), NewtonGreedy()])
)
def test_it_stops_when_the_gain_turns_negative(problem: Problem, rule: SelectionRule) -> None:
    """Without minimums and tokens: the picks up to the first that raises the loss, which no budget changes."""
    problem.in_tokens, problem.low, problem.high, n = False, None, None, len(problem.candidates())
    problem.budget = n
    if not problem.complete():
        return
    pool, given = problem.pool, problem.constraints()
    options = {"features": pool.features, "metric": pool.metric, "ids": pool.ids}
    whole = rule.select(pool.values, **options, budget=n, constraints=given)
    stops = Constraints(**{**vars(given), "stop_if_negative_gain": True})
    found = rule.select(pool.values, **options, budget=1.0, constraints=stops)
    harmful = (whole.gains[len(problem.first) :] > 0).nonzero().flatten().tolist()
    length = len(problem.first) + harmful[0] if harmful else n
    assert found.ids == whole.ids[:length]
    assert len(found) == found.budget == length


def test_a_budget_beyond_the_rows_that_are_allowed_is_a_limit_where_it_may_stop() -> None:
    """Equal rows leave one of two, which does no harm, so that nothing stops before the rows run out."""
    stops = Constraints(duplicates="first", stop_if_negative_gain=True)
    for rule in (TopK(), InteractionGreedy("plain"), InteractionGreedy("pruned"), NewtonGreedy()):
        found = rule.select(torch.zeros(2), torch.zeros(2, 1), budget=1.0, constraints=stops)
        assert (found.ids, found.budget) == ((0,), 1)


def test_nothing_that_helps_is_an_empty_selection() -> None:
    found = TopK().select(-torch.ones(3), budget=2, constraints=Constraints(stop_if_negative_gain=True))
    assert (found.ids, found.budget, found.objective) == ((), 0, 0.0)


def test_the_redundancy_filter_keeps_to_them() -> None:
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.01, 1.0], [1.0, 1.0]])
    values, rule = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), RedundancyFilter(0.9)
    assert rule.select(values, vectors, budget=3).ids == (0, 2, 4)
    assert rule.select(values, vectors, budget=3, constraints=Constraints(must_include=[3])).ids == (3, 0, 4)
    assert rule.select(values, vectors, budget=3, constraints=Constraints(must_include=[2, 3])).ids == (2, 3, 0)
    assert rule.select(values, vectors, budget=2, constraints=Constraints(exclude=[0])).ids == (1, 2)
    assert rule.select(values, vectors, budget=TokenBudget(9, counts=[1] * 5)).ids == (0, 2, 4)
    cheap = Constraints(costs=[100, 1, 1, 1, 1])
    assert rule.select(values, vectors, budget=2, constraints=cheap).ids == (1, 2)
    twins = Constraints(sources=["a", "a", "b", "b", "c"], min_per_source={"a": 2})
    with pytest.raises(ValueError, match=r"only 3 of 5 rows have no cosine above 0\.9 with a better one"):
        rule.select(values, vectors, budget=TokenBudget(9, counts=[1] * 5), constraints=twins)


@pytest.mark.parametrize("rule", [Random(), BalancedRandom([0, 1, 2])], ids=repr)
def test_rules_that_compare_no_gains_take_no_costs(rule: SelectionRule) -> None:
    message = f"`{rule!r}.select(constraints)`: {rule!r} compares no gains. Expected constraints without costs."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rule.select(torch.ones(3), budget=1, constraints=Constraints(costs=[1, 1, 1]))


def test_rows_are_known_by_id_in_sequences_mappings_and_functions() -> None:
    values, ids = torch.tensor([1.0, 2.0, 3.0]), [2, 0, 1]
    by_position = ["a", "b", "b"]  # of ids 0, 1 and 2
    for sources in (by_position, dict(enumerate(by_position)), by_position.__getitem__, torch.tensor([0, 1, 1])):
        limited = Constraints(sources=sources, max_per_source=1)
        assert TopK().select(values, budget=2, ids=ids, constraints=limited).ids == (1, 0)


def test_equal_rows_are_equal_to_the_last_bit() -> None:
    values = torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0])
    features = torch.tensor([[0.0], [-0.0], [1e-30], [0.0], [0.0]])
    once = Constraints(duplicates="first")
    found = TopK().select(values, features, budget=3, ids=["e", "d", "c", "b", "a"], constraints=once)
    assert found.ids == ("b", "a", "c")
    keys = Constraints(duplicates="first", duplicate_keys=["x", "x", "y", "y", "x"])
    assert TopK().select(values, budget=2, constraints=keys).ids == (0, 2)
    kept = Constraints(duplicates="first", must_include=[4], exclude=[0])
    assert InteractionGreedy().select(values, features, budget=3, constraints=kept).ids == (4, 3, 2)


def test_half_precision_features() -> None:
    once = Constraints(duplicates="first")
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        features = torch.tensor([[1, 2], [1, 2], [3, 4]]).to(dtype)
        assert TopK().select(torch.ones(3), features, budget=2, constraints=once).ids == (0, 2)


def test_a_share_of_the_tokens_of_the_pool() -> None:
    counts = [3, 3, 3, 1]
    assert TopK().select(torch.ones(4), budget=TokenBudget(0.6, counts=counts)).ids == (0, 1)
    assert TopK().select(torch.ones(4), budget=TokenBudget(0.7, counts=counts)).ids == (0, 1, 3)


@given(problem=problems(), data=st.data())
def test_a_budget_in_tokens_is_never_exceeded_and_used_up(problem: Problem, data: st.DataObject) -> None:
    problem.in_tokens, problem.budget = True, data.draw(st.integers(1, sum(problem.tokens.values())))
    if not problem.complete():
        return
    for rule in (TopK(), Random(), InteractionGreedy(), FacilityLocation(), RoundRobin(torch.ones(2, 9))):
        if problem.costs and isinstance(rule, Random):
            continue
        if isinstance(rule, RoundRobin):
            rule = RoundRobin(torch.ones(2, len(problem.pool.ids)), problem.pool.ids)
        picks = problem.select(rule)
        assert sum(problem.tokens[problem.pool.ids[row]] for row in picks) <= problem.budget
        assert not oracles.open_rows(list(picks), problem.complete())


def test_for_a_part_of_the_rows_they_were_settled_for() -> None:
    """Sources that are gone are not named any more, and what could not be picked is excluded by name."""
    whole = Constraints(
        must_include=["a"],
        exclude=["e"],
        sources={"a": 1, "b": 2, "c": 3, "d": 2, "e": 1},
        min_per_source={2: 1},
        max_per_source={1: 4, 3: 2},
        duplicates="first",
        duplicate_keys=dict.fromkeys("abcde", 0),
        costs=dict.fromkeys("abcde", 2.0),
        stop_if_negative_gain=True,
    )
    part = whole.of_part(["a", "b", "e"], ["a", "c", "e"])
    assert (part.must_include, part.exclude, part.duplicates, part.duplicate_keys) == (("a",), ("e",), "allow", None)
    assert (part.min_per_source, part.max_per_source) == ({2: 1}, {1: 4})
    assert (part.sources, part.costs, part.stop_if_negative_gain) == (whole.sources, whole.costs, True)
    assert Constraints(exclude=[3]).of_part([1, 2], [3]).exclude == ()
