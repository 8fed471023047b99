"""The laws that hold for every selection rule."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.selection import (
    BalancedRandom,
    BlockGreedy,
    Constraints,
    FacilityLocation,
    InteractionGreedy,
    NewtonGreedy,
    Random,
    RedundancyFilter,
    RoundRobin,
    Selection,
    SelectionRule,
    StochasticGreedy,
    Submodlib,
    TokenBudget,
    TopK,
)
from lightning_influence.selection.budget import Budget
from tests import oracles
from tests.selection.cases import Pool, clustered_pool, pools

BY_ID = [BalancedRandom(lambda name: len(str(name))), RoundRobin(torch.ones(2, 3))]  # know rows by their ids
RULES = [
    TopK(),
    InteractionGreedy(),
    InteractionGreedy("pruned"),
    InteractionGreedy("plain"),
    StochasticGreedy(0.5),
    BlockGreedy(2),
    NewtonGreedy(),
    Random(seed=3),
    RedundancyFilter(1),
    FacilityLocation(),
    *BY_ID,
]
OPTIONAL = {Submodlib}  # needs a package; test_submodlib.py goes through the laws
every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


def of_pool(rule: SelectionRule, pool: Pool) -> SelectionRule:
    """A rule that knows rows by their ids, with what it knows of those of the pool: by their place among the ids."""
    if rule not in BY_ID:
        return rule
    names = sorted(pool.ids)
    if isinstance(rule, BalancedRandom):
        return BalancedRandom({name: k % 3 for k, name in enumerate(names)}, seed=3)
    places = torch.arange(len(names))
    return RoundRobin(torch.stack([places * 5 % 7, -places]), names)


def choose(rule: SelectionRule, pool: Pool, budget: Budget, **options: Any) -> Selection:
    rule = of_pool(rule, pool)
    return rule.select(pool.values, pool.features, pool.metric, budget=budget, ids=pool.ids, **options)


def objective(rule: SelectionRule, pool: Pool, rows: list[int]) -> float:
    """What the rule predicts for some rows, dense."""
    if isinstance(rule, NewtonGreedy):
        damping = oracles.newton_damping(pool.features, rule.ridge)
        return oracles.newton_objective(pool.values, pool.features, pool.metric, rows, damping)
    return oracles.addition_objective(pool.values, pool.interactions, rows)


def test_no_rule_is_missing() -> None:
    def members(rule: type[SelectionRule]) -> set[type[SelectionRule]]:
        below = {member for child in rule.__subclasses__() for member in members(child)}
        return below or {rule}

    ours = {rule for rule in members(SelectionRule) if rule.__module__.startswith("lightning_influence.")}
    assert {type(rule) for rule in RULES} == ours - OPTIONAL


@every_rule
@given(pool=pools(), data=st.data())
def test_right_size_unique_and_labelled(rule: SelectionRule, pool: Pool, data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, len(pool.ids)))
    selection = choose(rule, pool, budget)
    assert len(selection) == selection.budget == budget == len(set(selection.ids))
    assert selection.ids == tuple(pool.ids[row] for row in selection.positions)
    assert selection.pool_size == len(pool.ids)
    assert selection.rule == repr(of_pool(rule, pool))
    assert selection.lower_bound is None


@every_rule
@given(pool=pools(), data=st.data())
def test_gains_are_those_of_the_group(rule: SelectionRule, pool: Pool, data: st.DataObject) -> None:
    selection = choose(rule, pool, data.draw(st.integers(1, len(pool.ids))))
    rows = list(selection.positions)
    truth = [objective(rule, pool, rows[:k]) for k in range(len(rows) + 1)]
    torch.testing.assert_close(selection.gains, torch.tensor(truth, dtype=torch.float64).diff())
    if not isinstance(rule, NewtonGreedy):
        torch.testing.assert_close(selection.first_order, -pool.values[rows])
    torch.testing.assert_close(selection.gains, selection.first_order + selection.interaction)
    assert selection.objective == pytest.approx(truth[-1], abs=1e-12)
    assert selection.gains.dtype == torch.float64


@pytest.mark.parametrize("rule", [rule for rule in RULES if not isinstance(rule, StochasticGreedy)], ids=repr)
@given(pool=pools())
def test_prefix(rule: SelectionRule, pool: Pool) -> None:
    whole = choose(rule, pool, 1.0)
    for budget in range(1, len(pool.ids) + 1):
        assert choose(rule, pool, budget).ids == whole.ids[:budget]


@every_rule
@given(pool=pools(), data=st.data())
def test_constraints_that_ask_for_nothing_change_nothing(rule: SelectionRule, pool: Pool, data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, len(pool.ids)))
    given_none = choose(rule, pool, budget)
    assert choose(rule, pool, budget, constraints=Constraints()).to_dict() == given_none.to_dict()
    tokens = TokenBudget(7 * budget + 6, counts=lambda name: 7)
    assert choose(rule, pool, tokens).to_dict() == given_none.to_dict()


@every_rule
def test_a_permuted_pool_gives_the_same_ids_within_constraints(rule: SelectionRule) -> None:
    pool = clustered_pool(90)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1)).tolist()
    limits = Constraints(
        must_include=pool.ids[3:6],
        exclude=pool.ids[10:20],
        sources=lambda name: name % 4,
        min_per_source={3: 9},
        max_per_source={0: 5},
        costs=(lambda name: 1 + name % 3) if rule.weighs_costs else None,
    )
    for budget in (30, TokenBudget(150, counts=lambda name: 2 + name % 7)):
        found = choose(rule, pool, budget, constraints=limits)
        assert found.ids == choose(rule, pool.permuted(order), budget, constraints=limits).ids
        assert found.ids[:3] == pool.ids[3:6]
        assert not set(found.ids) & set(pool.ids[10:20])
        counts = [sum(name % 4 == source for name in found.ids) for source in range(4)]
        assert (counts[3] >= 9, counts[0] <= 5) == (True, True)
        spent = 2 * len(found) + sum(name % 7 for name in found.ids)
        assert len(found) == 30 if budget == 30 else 141 < spent <= 150


@every_rule
@given(pool=pools(), data=st.data())
def test_a_permuted_pool_gives_the_same_ids(rule: SelectionRule, pool: Pool, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(pool.ids))))
    assert choose(rule, pool.permuted(order), 1.0).ids == choose(rule, pool, 1.0).ids


@every_rule
@given(pool=pools())
def test_other_names_in_the_same_order_give_the_same_rows(rule: SelectionRule, pool: Pool) -> None:
    names = {name: f"{rank:03}" for rank, name in enumerate(sorted(pool.ids))}
    renamed = Pool(pool.values, pool.features, pool.metric, tuple(names[name] for name in pool.ids))
    assert choose(rule, renamed, 1.0).positions == choose(rule, pool, 1.0).positions


@every_rule
def test_twins_whose_numbers_round_are_still_ties(rule: SelectionRule) -> None:
    pool = clustered_pool()
    order = torch.randperm(len(pool.ids), generator=torch.Generator().manual_seed(1)).tolist()
    assert choose(rule, pool.permuted(order), 150).ids == choose(rule, pool, 150).ids


@every_rule
@given(pool=pools())
def test_inputs_and_the_generator_are_untouched(rule: SelectionRule, pool: Pool) -> None:
    before = [tensor.clone() for tensor in (pool.values, pool.features)]
    metric = None if pool.metric is None else pool.metric.clone()
    state = torch.get_rng_state()
    choose(rule, pool, 1.0)
    assert torch.equal(pool.values, before[0])
    assert torch.equal(pool.features, before[1])
    assert metric is None or torch.equal(pool.metric, metric)
    assert torch.equal(torch.get_rng_state(), state)


@every_rule
def test_a_share_is_its_count(rule: SelectionRule) -> None:
    pool = clustered_pool(60)
    assert choose(rule, pool, 0.1).to_dict() == choose(rule, pool, 6).to_dict()


@every_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_products_are_taken_in_float64(rule: SelectionRule, dtype: torch.dtype) -> None:
    pool = clustered_pool(60, dtype=dtype)
    exact = Pool(pool.values, pool.features.double(), pool.metric, pool.ids)
    assert choose(rule, pool, 30).to_dict() == choose(rule, exact, 30).to_dict()


@every_rule
def test_tensors_with_gradients_are_taken_as_they_are(rule: SelectionRule) -> None:
    values, features = torch.ones(3, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    assert not rule.select(values, features, budget=2).gains.requires_grad


@every_rule
def test_one_row(rule: SelectionRule) -> None:
    selection = rule.select(torch.tensor([2.0]), torch.tensor([[3.0]]), budget=1, ids=[0])
    step = 1 / (9 + rule.ridge * 9) if isinstance(rule, NewtonGreedy) else 1.0
    first_order, interaction = -2.0 * step, 4.5 * step**2
    assert selection.to_dict() == {
        "ids": [0],
        "positions": [0],
        "gains": [pytest.approx(first_order + interaction)],
        "first_order": [pytest.approx(first_order)],
        "interaction": [pytest.approx(interaction)],
        "budget": 1,
        "objective": pytest.approx(first_order + interaction),
        "rule": repr(rule),
        "pool_size": 1,
        "lower_bound": None,
        "weight": None,
        "screened": 0,
        "held_out": None,
    }


@every_rule
@given(pool=pools())
def test_round_trip_through_json(rule: SelectionRule, pool: Pool) -> None:
    selection = choose(rule, pool, 1.0)
    again = Selection.from_dict(json.loads(json.dumps(selection.to_dict())))
    assert again.to_dict() == selection.to_dict()
    assert torch.equal(again.gains, selection.gains)


@pytest.mark.parametrize("rule", [TopK(), Random()], ids=repr)
def test_without_features_there_is_no_interaction(rule: SelectionRule) -> None:
    selection = rule.select(torch.tensor([1.0, 2.0, 3.0]), budget=2)
    assert selection.interaction.tolist() == [0.0, 0.0]
    assert torch.equal(selection.gains, selection.first_order)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty pool": (
        {"values": torch.zeros(0), "features": None},
        ".select(values)`: expected at least one example. The pool is empty.",
    ),
    "two-dimensional values": (
        {"values": torch.zeros(3, 1)},
        ".select(values)`: expected a real tensor [n], one number per example. Got a tensor of shape [3, 1].",
    ),
    "complex values": (
        {"values": torch.zeros(3, dtype=torch.complex64)},
        ".select(values)`: expected a real tensor [n], one number per example. Got a complex tensor of shape [3].",
    ),
    "NaN value": (
        {"values": torch.tensor([0.0, torch.nan, torch.inf]), "ids": ["a", "b", "c"]},
        ".select(values)`: expected finite numbers. 2 of 3 examples have NaN or infinite values: ids 'b', 'c'. "
        "Look at their loss, or leave them out.",
    ),
    "NaN feature": (
        {"features": torch.tensor([[0.0, 0.0], [1.0, torch.nan], [0.0, 0.0]])},
        ".select(features)`: expected finite numbers. 1 of 3 examples have NaN or infinite features: id 1. "
        "Look at their loss, or leave them out.",
    ),
    "features of another pool": (
        {"features": torch.zeros(4, 2)},
        ".select(features)`: expected a real tensor [n, r], one row for each of the n = 3 values and r >= 1. "
        "Got a tensor of shape [4, 2].",
    ),
    "features without columns": (
        {"features": torch.zeros(3, 0)},
        ".select(features)`: expected a real tensor [n, r], one row for each of the n = 3 values and r >= 1. "
        "Got a tensor of shape [3, 0].",
    ),
    "metric of another size": (
        {"metric": torch.eye(3)},
        ".select(metric)`: expected a real tensor [r, r] with r = 2, the columns of the features. "
        "Got a tensor of shape [3, 3].",
    ),
    "NaN metric": (
        {"metric": torch.full((2, 2), torch.nan)},
        ".select(metric)`: expected finite numbers. The metric holds NaN or infinity.",
    ),
    "metric that is not symmetric": (
        {"metric": torch.tensor([[1.0, 0.5], [0.0, 1.0]])},
        ".select(metric)`: expected a symmetric matrix, as a Hessian or Fisher is; it need not be definite. "
        "Pass (metric + metric.T) / 2 if the difference is only rounding.",
    ),
    "metric without features": (
        {"features": None, "metric": torch.eye(2)},
        ".select(metric)`: expected features to go with the metric. Pass `features` [n, r] too.",
    ),
    "repeated ids": (
        {"ids": [7, 8, 7]},
        ".select(ids)`: expected unique ids. More than once: id 7.",
    ),
    "missing ids": (
        {"ids": [7, 8]},
        ".select(ids)`: expected one id for each of the 3 values. Got 2.",
    ),
    "mixed ids": (
        {"ids": [7, "8", 9]},
        ".select(ids)`: expected ids that are all int or all str. Got int, str.",
    ),
    "ids that are flags": (
        {"ids": [0, 1, True]},
        ".select(ids)`: expected ids that are all int or all str. Got bool, int.",
    ),
    "budget above the pool": (
        {"budget": 4},
        ".select(budget=4)`: expected an int >= 1 or a fraction in (0, 1]. The pool has 3 rows; "
        "pass 1.0 to take all of them.",
    ),
    "budget of nothing": (
        {"budget": 0},
        ".select(budget=0)`: expected an int >= 1 or a fraction in (0, 1]. A selection needs at least one row.",
    ),
}


@every_rule
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(rule: SelectionRule, case: str) -> None:
    changes, message = BAD[case]
    arguments = {"values": torch.ones(3), "features": torch.ones(3, 2), "budget": 2, **changes}
    with pytest.raises(ValueError, match=f"^{re.escape(f'`{rule!r}{message}')}$"):
        rule.select(**arguments)
