from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.selection import Constraints, InteractionGreedy, Random, StochasticGreedy
from tests.oracles import addition_objective
from tests.selection.cases import Pool, clustered_pool, pools


def chosen(pool: Pool, rule: StochasticGreedy, budget: int, **options: Any) -> tuple[int, ...]:
    return rule.select(pool.values, pool.features, pool.metric, budget=budget, ids=pool.ids, **options).positions


def by_hand(pool: Pool, budget: int, epsilon: float, seed: int) -> list[int]:
    """One row at a time; draws are places in a list that starts in the order of ids."""
    generator, n = np.random.default_rng(seed), len(pool.ids)
    size = math.ceil(n / budget * math.log(1 / epsilon))
    left, picks = sorted(range(n), key=pool.ids.__getitem__), []
    for _ in range(budget):
        places = generator.choice(len(left), min(size, len(left)), replace=False, shuffle=False).tolist()
        outcome = [
            (addition_objective(pool.values, pool.interactions, [*picks, left[p]]), pool.ids[left[p]]) for p in places
        ]
        best = places[outcome.index(min(outcome))]
        picks.append(left[best])
        left[best] = left[-1]
        left.pop()
    return picks


@given(pool=pools(), data=st.data(), epsilon=st.sampled_from([0.05, 0.5, 0.9]), seed=st.integers(0, 99))
def test_it_is_the_best_of_each_sample(pool: Pool, data: st.DataObject, epsilon: float, seed: int) -> None:
    budget = data.draw(st.integers(1, len(pool.ids)))
    assert list(chosen(pool, StochasticGreedy(epsilon, seed), budget)) == by_hand(pool, budget, epsilon, seed)


def test_samples_of_all_rows_are_exact() -> None:
    pool = clustered_pool()
    exact = InteractionGreedy().select(pool.values, pool.features, pool.metric, budget=20, ids=pool.ids)
    assert chosen(pool, StochasticGreedy(1e-12), 20) == exact.positions
    limits = Constraints(sources=lambda name: name % 4, max_per_source=4, costs=lambda name: 1 + name % 3)
    within = InteractionGreedy().select(
        pool.values, pool.features, pool.metric, budget=16, ids=pool.ids, constraints=limits
    )
    assert chosen(pool, StochasticGreedy(1e-12), 16, constraints=limits) == within.positions


def test_it_lies_between_random_and_exact() -> None:
    pool = clustered_pool()
    objectives = [
        rule.select(pool.values, pool.features, budget=30, ids=pool.ids).objective
        for rule in (InteractionGreedy(), StochasticGreedy(), Random())
    ]
    assert objectives == sorted(objectives)
    assert objectives[1] < 0.7 * objectives[0]


def test_seeds_differ_and_the_order_of_the_pool_does_not_matter() -> None:
    pool = clustered_pool()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(5)).tolist()
    mixed = pool.permuted(order)
    ids = [pool.ids[row] for row in chosen(pool, StochasticGreedy(), 80)]
    assert [mixed.ids[row] for row in chosen(mixed, StochasticGreedy(), 80)] == ids
    assert [pool.ids[row] for row in chosen(pool, StochasticGreedy(seed=1), 80)] != ids


@pytest.mark.parametrize("epsilon", [0, 1, 1.5, math.nan, True, "0.1"])
def test_epsilon_is_a_share(epsilon: Any) -> None:
    message = re.escape(f"`StochasticGreedy(epsilon={epsilon!r})`: expected a number in (0, 1)")
    with pytest.raises(ValueError, match=message):
        StochasticGreedy(epsilon)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0])
def test_seed_is_an_int(seed: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"`StochasticGreedy(seed={seed!r})`: expected an int")):
        StochasticGreedy(seed=seed)
