from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given

from lightning_influence.estimators import factors
from lightning_influence.selection import Constraints, InteractionGreedy, TokenBudget, TopK, greedy_rule
from tests import oracles
from tests.selection.cases import Pool, clustered_pool, pools


def greedy(pool: Pool, budget: int | float) -> tuple[int, ...]:
    rule = InteractionGreedy("pruned")  # the default takes the plain way through pools this small
    return rule.select(pool.values, pool.features, pool.metric, budget=budget, ids=pool.ids).positions


@given(pool=pools())
def test_every_step_is_that_of_brute_force(pool: Pool) -> None:
    truth = oracles.greedy(pool.values, pool.interactions, len(pool.ids), pool.ids)
    assert list(greedy(pool, 1.0)) == truth


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_brute_force_on_numbers_that_round(dtype: torch.dtype) -> None:
    pool = clustered_pool(24, 5, dtype)
    truth = oracles.greedy(pool.values, pool.interactions, 24, pool.ids)
    assert list(greedy(pool, 24)) == truth


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = clustered_pool()
    at_once = greedy(pool, 100)
    monkeypatch.setattr(factors, "_BLOCK_ON_CPU", 37 * 7)
    assert greedy(pool, 100) == at_once


def test_strided_features() -> None:
    pool = clustered_pool()
    strided = Pool(pool.values, pool.features.T.contiguous().T, pool.metric, pool.ids)
    assert greedy(strided, 100) == greedy(pool, 100)


def test_a_metric_is_the_identity_on_its_root() -> None:
    pool = clustered_pool()
    root = torch.randn(37, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with_metric = Pool(pool.values, pool.features, root @ root.T, pool.ids)
    assert greedy(Pool(pool.values, pool.features @ root, None, pool.ids), 100) == greedy(with_metric, 100)


def test_rounding_of_a_float32_metric_is_averaged_out() -> None:
    pool = clustered_pool(dtype=torch.float32)
    noise = 1e-6 * torch.randn(37, 37, generator=torch.Generator().manual_seed(3))
    rough = pool.metric.float() + noise
    symmetric = (rough.double() + rough.double().T) / 2
    assert greedy(Pool(pool.values, pool.features, rough, pool.ids), 50) == greedy(
        Pool(pool.values, pool.features, symmetric, pool.ids), 50
    )


def test_never_worse_than_topk_at_the_first_pick_and_better_on_twins() -> None:
    values, features = torch.tensor([2.0, 2.0, 1.5]), torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    selection = InteractionGreedy().select(values, features, budget=2)
    assert selection.ids == (2, 0)
    assert selection.objective < TopK().select(values, features, budget=2).objective


def test_late_picks_that_raise_the_loss_are_made_and_shown() -> None:
    values, features = torch.tensor([1.0, -1.0]), torch.tensor([[1.0], [1.0]])
    assert InteractionGreedy().select(values, features, budget=2).gains.tolist() == [-0.5, 2.5]


def test_a_large_value_elsewhere_does_not_blur_small_differences() -> None:
    values = torch.tensor([1.0, 1.0 + 1e-9, 1e12, -1e12], dtype=torch.float64)
    features = torch.eye(4, dtype=torch.float64)
    for method in ("plain", "pruned"):
        assert InteractionGreedy(method).select(values, features, budget=4).ids == (2, 1, 0, 3)


def test_without_features() -> None:
    message = (
        "`InteractionGreedy().select(features=None)`: expected features [n, r] with the interactions K = F M Fᵀ. "
        "Use `TopK()` to select by the values alone."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        InteractionGreedy().select(torch.ones(3), budget=1)


def test_a_bar_only_when_long(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    greedy(clustered_pool(30), 5)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(greedy_rule, "_DELAY", 0)
    greedy(clustered_pool(30), 5)
    assert "InteractionGreedy" in capfd.readouterr().err


LIMITS: dict[str, tuple[Any, dict[str, Any]]] = {
    "minimum and maximum": (120, {"sources": lambda name: name % 4, "min_per_source": 29, "max_per_source": {1: 31}}),
    "tokens": (TokenBudget(600, counts=lambda name: 3 + name % 13), {}),
    "tokens and sources": (
        TokenBudget(600, counts=lambda name: 3 + name % 13),
        {"sources": lambda name: name % 7, "min_per_source": 9, "max_per_source": 14},
    ),
    "included, excluded and equal rows": (
        90,
        {"must_include": [5, 3, 250], "exclude": range(10, 60), "duplicates": "first"},
    ),
    "a stop and a minimum": (
        250,
        {"sources": lambda name: name % 3, "min_per_source": {2: 80}, "stop_if_negative_gain": True},
    ),
    "costs": (90, {"costs": lambda name: 1 + name % 3}),
}


@pytest.mark.parametrize("case", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_all_methods_make_the_same_picks_within_constraints(case: str, dtype: torch.dtype) -> None:
    pool = clustered_pool(dtype=dtype)
    budget, limits = LIMITS[case]
    options = {"budget": budget, "ids": pool.ids, "constraints": Constraints(**limits)}
    pruned, plain, auto = (
        InteractionGreedy(method=method).select(pool.values, pool.features, pool.metric, **options)
        for method in ("pruned", "plain", "auto")
    )
    assert pruned.ids == plain.ids == auto.ids
    assert pruned.ids != InteractionGreedy().select(pool.values, pool.features, pool.metric, budget=len(pruned)).ids
