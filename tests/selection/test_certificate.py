from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.selection import InteractionGreedy, TopK, certificate, certify
from tests import oracles
from tests.selection.cases import Pool, clustered_pool, pools


def bound(pool: Pool, budget: int, **settings: Any) -> tuple[float, float]:
    selection = InteractionGreedy().select(pool.values, pool.features, pool.metric, budget=budget, ids=pool.ids)
    certified = certify(selection, pool.values, pool.features, pool.metric, ids=pool.ids, **settings)
    assert certified.optimality_gap == certified.objective - certified.lower_bound >= 0
    return certified.lower_bound, certified.objective


@settings(deadline=None, max_examples=40)
@given(pool=pools(), data=st.data())
def test_no_group_is_below_the_bound(pool: Pool, data: st.DataObject) -> None:
    n = len(pool.ids)
    budget = data.draw(st.integers(1, n))
    lower, _ = bound(pool, budget, steps=data.draw(st.sampled_from([1, 3, 40])))
    interactions = pool.interactions
    for group in itertools.combinations(range(n), budget):
        assert lower <= oracles.addition_objective(pool.values, interactions, list(group)) + 1e-12


@pytest.mark.parametrize("metric", [None, "psd"])
def test_large_pools_without_the_dense_form(metric: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "_DENSE", 5)
    pool = clustered_pool(12, 4, torch.float32)
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double()
    pool = Pool(pool.values / 5, pool.features, None if metric is None else root @ root.T, pool.ids)
    lower, objective = bound(pool, 4)
    best = min(
        oracles.addition_objective(pool.values, pool.interactions, list(g))
        for g in itertools.combinations(range(12), 4)
    )
    assert lower <= best <= objective + 1e-12
    assert objective - lower < 0.5 * abs(objective)


def test_the_relaxed_minimum_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed form: equal b and orthonormal rows give x = k/n for all, −k b + k² / 2n."""
    monkeypatch.setattr(certificate, "_DENSE", 0)
    pool = Pool(torch.ones(8).double(), torch.eye(8).double(), None, tuple(range(8)))
    lower, _ = bound(pool, 2, tolerance=1e-9, steps=200)
    assert lower == pytest.approx(-2 + 4 / 16, abs=1e-6)


@pytest.mark.parametrize("budget", [1, 4, 8])
def test_rows_that_do_not_interact_leave_no_gap(budget: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.diag(torch.rand(8, generator=generator).double() + 0.5)
    pool = Pool(torch.rand(8, generator=generator).double(), features, None, tuple(range(8)))
    lower, objective = bound(pool, budget)
    assert objective - lower < 1e-8
    alone = TopK().select(pool.values, budget=budget)
    assert certify(alone, pool.values).optimality_gap < 1e-12


def test_an_indefinite_metric_is_refused_in_large_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "_DENSE", 2)
    metric = torch.diag(torch.tensor([1.0, -1.0]))
    selection = InteractionGreedy().select(torch.ones(3), torch.ones(3, 2), metric, budget=1)
    with pytest.raises(ValueError, match="expected a positive semi-definite metric for a pool of more than 2 rows"):
        certify(selection, torch.ones(3), torch.ones(3, 2), metric)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.ones(4)}, "`certify(values)`: expected the pool of the selection, with 3 rows. Got 4."),
        ({"ids": [5, 6, 7]}, "`certify(ids)`: expected the ids of the pool of the selection, in the same order."),
        ({"steps": 0}, "`certify(steps=0)`: expected an int >= 1."),
        ({"tolerance": 0.0}, "`certify(tolerance=0.0)`: expected a number > 0, such as 1e-4."),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    selection = TopK().select(torch.ones(3), budget=1)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        certify(selection, **{"values": torch.ones(3), **changes})


def test_an_objective_of_another_kind_is_refused() -> None:
    selection = TopK().select(torch.ones(3), torch.ones(3, 1), budget=2)
    with pytest.raises(ValueError, match=r"which is -2 for these rows, .* Got 0: pass what the rule was given"):
        certify(selection, torch.ones(3))
