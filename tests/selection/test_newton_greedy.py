from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.estimators import Interactions, factors
from lightning_influence.selection import Constraints, NewtonGreedy, TokenBudget, TopK, newton_greedy
from tests import oracles
from tests.selection.cases import Pool, clustered_pool, pools


def greedy(pool: Pool, budget: int | float, ridge: float = 0.3) -> tuple[int, ...]:
    rule = NewtonGreedy(ridge)
    return rule.select(pool.values, pool.features, pool.metric, budget=budget, ids=pool.ids).positions


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(pool=pools(), ridge=st.sampled_from([0.01, 0.3, 4.0]))
def test_every_step_is_that_of_brute_force(pool: Pool, ridge: float) -> None:
    damping = oracles.newton_damping(pool.features, ridge)
    truth = oracles.newton_greedy(pool.values, pool.features, pool.metric, len(pool.ids), pool.ids, damping)
    assert list(greedy(pool, 1.0, ridge)) == truth


@given(
    pool=pools(),
    ridge=st.sampled_from([0.01, 0.3]),
    few=st.integers(1, 4),
    longest=st.integers(1, 5),
)
def test_what_is_foreseen_does_not_matter(pool: Pool, ridge: float, few: int, longest: int) -> None:
    """However badly: among one to four rows."""
    expected = greedy(pool, 1.0, ridge)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(newton_greedy, "FEWEST", few)
        patch.setattr(newton_greedy, "LONGEST", longest)
        assert greedy(pool, 1.0, ridge) == expected


@pytest.mark.parametrize("few", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_runs_make_the_picks_of_single_passes(few: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within constraints, which what is foreseen does not know of."""
    pool = clustered_pool(dtype=dtype)
    n, names = len(pool.ids), pool.ids
    costs = normal(n, seed=6).abs() + 0.1
    sources = [f"s{name % 3}" for name in names]
    cases: list[tuple[Any, Constraints | None]] = [
        (120, None),
        (60, Constraints(must_include=names[40:45], exclude=names[:9])),
        (90, Constraints(sources=sources, min_per_source=20, max_per_source=35)),
        (80, Constraints(costs=costs)),
        (250, Constraints(stop_if_negative_gain=True)),
        (TokenBudget(300, counts=[name % 7 + 1 for name in names]), None),
    ]

    def picks() -> list[tuple[int, ...]]:
        rule, given = NewtonGreedy(0.05), (pool.values, pool.features, pool.metric)
        found = [rule.select(*given, budget=k, ids=names, constraints=limits) for k, limits in cases]
        return [selection.positions for selection in found]

    monkeypatch.setattr(newton_greedy, "LONGEST", 1)
    expected = picks()
    assert len(expected[4]) < 250
    monkeypatch.undo()
    assert picks() == expected
    monkeypatch.setattr(newton_greedy, "FEWEST", few)
    assert picks() == expected


def test_most_picks_come_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, passes = clustered_pool(), []
    products = newton_greedy._Search._products
    monkeypatch.setattr(
        newton_greedy._Search, "_products", lambda self, rows: passes.append(len(rows)) or products(self, rows)
    )
    greedy(pool, 200, 0.05)
    assert len(passes) < 12
    assert sum(passes) == 2 * 200  # nothing was foreseen wrongly among all rows


@given(pool=pools(), seed=st.integers(0, 3))
def test_every_step_is_that_of_brute_force_with_unseen_parts(pool: Pool, seed: int) -> None:
    unseen = normal(len(pool.ids), seed=seed).square()
    rule = NewtonGreedy(0.3, unseen, pool.ids)
    mean = float((pool.features.double().square().sum(1) + unseen).mean())
    truth = oracles.newton_greedy(
        pool.values, pool.features, pool.metric, len(pool.ids), pool.ids, unseen + 0.3 * (mean or 1.0)
    )
    found = rule.select(pool.values, pool.features, pool.metric, budget=1.0, ids=pool.ids)
    assert list(found.positions) == truth


def test_an_unseen_part_is_a_direction_of_its_own() -> None:
    """The same picks and gains as from features in which each row has one more column for it."""
    features, targets, unseen = normal(14, 5), normal(6, 5, seed=1), normal(14, seed=2).square()
    whole = Interactions.from_features(
        torch.cat([features, unseen.sqrt().diag()], dim=1), torch.cat([targets, torch.zeros(6, 14)], dim=1)
    )
    expected = whole.select(NewtonGreedy(0.1), 10)
    short = Interactions.from_features(features, targets)
    found = short.select(NewtonGreedy(0.1, unseen), 10)
    assert found.ids == expected.ids
    torch.testing.assert_close(found.gains, expected.gains)
    assert short.select(NewtonGreedy(0.1), 10).ids != expected.ids


def test_unseen_parts_are_found_by_id() -> None:
    pool, unseen = clustered_pool(30), normal(30).square()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    rule = NewtonGreedy(0.1, unseen[order], [pool.ids[row] for row in order.tolist()])
    given = {"budget": 12, "ids": pool.ids}
    found = rule.select(pool.values, pool.features, pool.metric, **given)
    straight = NewtonGreedy(0.1, unseen, pool.ids)
    assert found.ids == straight.select(pool.values, pool.features, pool.metric, **given).ids
    assert found.rule == "NewtonGreedy(ridge=0.1)"
    with pytest.raises(ValueError, match=r"`NewtonGreedy\(ridge=0.1\).select`: expected data for every row"):
        NewtonGreedy(unseen=torch.ones(1)).select(torch.ones(2), torch.ones(2, 1), budget=1)


@pytest.mark.parametrize(
    ("unseen", "ids", "message"),
    [
        (torch.ones(3, 1), None, r"expected a number for each row \[n\]. Got shape \[3, 1\]"),
        (torch.ones(3), ["a"], r"\[n\], n = 1. Got shape \[3\]"),
        (torch.tensor([1.0, torch.nan]), ["a", "b"], "have NaN or infinite unseen: id 'b'"),
        ([0.0, -1.0], None, "expected squared lengths >= 0, got -1"),
    ],
)
def test_unseen_parts_that_are_none(unseen: Any, ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NewtonGreedy(unseen=unseen, ids=ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_brute_force_on_numbers_that_round(dtype: torch.dtype) -> None:
    pool = clustered_pool(24, 5, dtype)
    damping = oracles.newton_damping(pool.features, 0.3)
    truth = oracles.newton_greedy(pool.values, pool.features, pool.metric, 24, pool.ids, damping)
    assert list(greedy(pool, 24)) == truth


@pytest.mark.parametrize(("n", "m", "r"), [(12, 5, 7), (12, 9, 40), (10, 3, 2)])
@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_it_is_kernel_ridge_regression_of_the_constant_one(n: int, m: int, r: int, ridge: float) -> None:
    """J(S) = (1/2m) ‖1 − K_tS α‖² − ½, every row tried at every step, with the regression solved in its primal form."""
    features, targets = normal(n, r), normal(m, r, seed=1)
    damping = oracles.newton_damping(features, ridge)

    def predicted(rows: list[int]) -> float:
        design = torch.cat([features[rows], damping**0.5 * torch.eye(r).double()])
        goal = torch.cat([torch.ones(len(rows)), torch.zeros(r)]).double()
        w = torch.linalg.lstsq(design, goal[:, None]).solution[:, 0]
        return float((1 - targets @ w).square().sum() / (2 * m) - 0.5)

    chosen: list[int] = []
    for _ in range(n):
        chosen.append(min((row for row in range(n) if row not in chosen), key=lambda row: predicted([*chosen, row])))
    selection = Interactions.from_features(features, targets).select(NewtonGreedy(ridge), n)
    assert list(selection.ids) == chosen
    truth = torch.tensor([0.0] + [predicted(chosen[: k + 1]) for k in range(n)]).double()
    torch.testing.assert_close(selection.gains, truth.diff(), rtol=1e-6, atol=1e-7)


def test_gains_do_not_drift() -> None:
    """Hundreds of updates on rows that nearly repeat each other, against one solve at the end."""
    features = (normal(30, 20).repeat(10, 1) + 1e-3 * normal(300, 20, seed=3)) * normal(300, 1, seed=4).exp()
    selection = Interactions.from_features(features, normal(15, 20, seed=5)).select(NewtonGreedy(1e-3), 250)
    targets = normal(15, 20, seed=5)
    values, metric = features @ targets.mean(0), targets.T @ targets / 15
    truth = oracles.newton_objective(
        values, features, metric, list(selection.ids), oracles.newton_damping(features, 1e-3)
    )
    assert selection.objective == pytest.approx(truth, rel=1e-8)


def test_a_large_ridge_is_additive() -> None:
    pool = clustered_pool(60, 9)
    expected = TopK().select(pool.values, budget=40, ids=pool.ids).positions
    assert greedy(pool, 40, 1e9) == expected


def test_a_wrong_label_is_left_alone() -> None:
    """Its gradient opposes those of the rows beside it, also where alone it seems to help a target."""
    features = torch.tensor([[1.0, 0.1], [1.0, 0.0], [-1.0, 0.3], [0.0, 1.0], [0.1, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    selection = Interactions.from_features(features, targets).select(NewtonGreedy(0.1), 5)
    assert selection.ids[-1] == 2
    assert selection.gains[-1] > 0


@pytest.mark.parametrize("scale", [1e-4, 1e5])
def test_the_ridge_is_a_share(scale: float) -> None:
    """Of whitened gradients: with them the step is divided by the scale, and the constant stays 1."""
    features, targets = normal(20, 6), normal(8, 6, seed=1)
    one = Interactions.from_features(features, targets).select(NewtonGreedy(0.2), 12)
    other = Interactions.from_features(scale * features, scale * targets).select(NewtonGreedy(0.2), 12)
    assert one.ids == other.ids
    torch.testing.assert_close(one.gains, other.gains)


def test_blocks_and_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = clustered_pool()
    at_once = greedy(pool, 100)
    monkeypatch.setattr(factors, "_BLOCK_ON_CPU", 37 * 7)
    assert greedy(pool, 100) == at_once
    strided = Pool(pool.values, pool.features.T.contiguous().T, pool.metric, pool.ids)
    assert greedy(strided, 100) == at_once


def test_rows_without_a_gradient() -> None:
    values, features = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([[0.0], [1.0], [0.0]])
    selection = NewtonGreedy().select(values, features, budget=3)
    assert selection.ids == (1, 0, 2)
    assert selection.gains[1:].tolist() == [0.0, 0.0]
    assert NewtonGreedy().select(torch.zeros(2), torch.zeros(2, 1), budget=2).gains.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("ridge", [0, -1.0, float("nan"), float("inf"), True, "auto", None])
def test_a_ridge_that_is_none(ridge: Any) -> None:
    message = f"`NewtonGreedy(ridge={ridge!r})`: expected a finite number > 0, such as 0.1."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        NewtonGreedy(ridge)


def test_without_features() -> None:
    message = (
        "`NewtonGreedy(ridge=0.1).select(features=None)`: expected features [n, r], the whitened gradients of the "
        "pool. Use `TopK()` to select by the values alone."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        NewtonGreedy().select(torch.ones(3), budget=1)


def test_a_bar_only_when_long(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    greedy(clustered_pool(30), 5)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(newton_greedy, "_LONG", 1)
    greedy(clustered_pool(30), 5)
    assert "NewtonGreedy" in capfd.readouterr().err
