"""How much the pool counts beside few targets: against the mean over all draws, and the mixed loss written out."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence.estimators.interactions import Interactions
from lightning_influence.selection import Newton, NewtonGreedy, NewtonPool, target_shrinkage
from lightning_influence.selection.target_shrinkage import pool_share, with_pool
from tests import oracles
from tests.curvature.models import normal

POOL, TARGETS = normal(30, 6, seed=1), normal(5, 6, seed=2) + 1.0


def by_hand(features: Tensor, targets: Tensor, counts: list[float]) -> float:
    """V of the mean as Σ_t p_t² σ², σ² by all pairs of targets, which knows of no mean."""
    p = [count / sum(counts) for count in counts]
    pairs = list(combinations(range(len(p)), 2))
    spread = sum(p[s] * p[t] * float((targets[s] - targets[t]).square().sum()) for s, t in pairs)
    noise = spread / (2 * sum(p[s] * p[t] for s, t in pairs)) * sum(share**2 for share in p)
    n = len(features)
    pool_noise = float((features - features.mean(0)).square().sum()) / n**2
    mean = sum(share * row for share, row in zip(p, targets, strict=True))
    return noise / max(float((mean - features.mean(0)).square().sum()), noise + pool_noise)


@pytest.mark.parametrize("shares", [None, [0.2] * 5, [1.0, 2.0, 0.0, 0.5, 1.0]])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_scatter_over_distance(monkeypatch: pytest.MonkeyPatch, shares: list[float] | None, shift: float) -> None:
    monkeypatch.setattr(target_shrinkage, "BLOCK", 7)
    weights = None if shares is None else torch.tensor(shares)
    found = pool_share(POOL, TARGETS + shift, weights)
    assert found == pytest.approx(by_hand(POOL, TARGETS + shift, shares or [1.0] * 5), rel=1e-9)
    assert 0 < found < 1
    assert pool_share(POOL.half(), TARGETS + shift, weights) == pytest.approx(found, rel=1e-2)


def test_the_error_of_the_mean_is_least_there() -> None:
    """Over many draws of targets from a known normal distribution, away from the pool by a known distance."""
    generator = torch.Generator().manual_seed(0)
    r, m, n = 400, 10, 40
    truth = torch.zeros(r).double()
    truth[0] = 4.0
    errors, shares = torch.zeros(21).double(), []
    for _ in range(200):
        pool = torch.randn(n, r, generator=generator, dtype=torch.float64)
        goals = truth + torch.randn(m, r, generator=generator, dtype=torch.float64)
        shares.append(pool_share(pool, goals))
        grid = torch.linspace(0, 1, 21, dtype=torch.float64)[:, None]
        errors += ((1 - grid) * goals.mean(0) + grid * pool.mean(0) - truth).square().sum(1)
    best = float(errors.argmin()) / 20
    assert sum(shares) / len(shares) == pytest.approx(best, abs=0.03)
    assert best == pytest.approx((r / m) / (r / m + r / n + 16), abs=0.03)


def test_what_features_leave_out_is_scatter_of_the_pool() -> None:
    """Each row has a direction of its own for it."""
    unseen = torch.linspace(0, 2, 30).double()
    whole = torch.cat([POOL, unseen.sqrt().diag()], dim=1)
    goals = torch.cat([TARGETS, torch.zeros(5, 30).double()], dim=1)
    for shift in (0.0, 3.0):
        goals[:, :6] += shift
        assert pool_share(POOL, goals[:, :6], unseen=unseen) == pytest.approx(pool_share(whole, goals), rel=1e-9)


def test_targets_like_the_pool_count_one_for_one() -> None:
    """The targets are the pool itself, twice: their means are the same, and n / (n + m) is left of scatter."""
    assert pool_share(POOL, torch.cat([POOL, POOL])) == pytest.approx(1 / 3, abs=0.02)
    assert pool_share(POOL, POOL[:2] * 1e-6 + 50) < 1e-9


def test_no_pool_where_nothing_is_known_of_the_scatter_or_something_is_avoided() -> None:
    assert pool_share(POOL, TARGETS[:1]) == 0
    assert pool_share(POOL, TARGETS[:1].expand(3, -1)) == pytest.approx(0, abs=1e-12)
    assert pool_share(POOL, TARGETS, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])) == 0
    assert pool_share(POOL, TARGETS, torch.tensor([0.5, 1.0, -0.5, 1.0, 1.0])) == 0


@pytest.mark.parametrize("with_metric", [True, False])
def test_the_mixed_loss(monkeypatch: pytest.MonkeyPatch, with_metric: bool) -> None:
    """Pool rows are targets of the share a / n, and targets of (1 - a) / m."""
    monkeypatch.setattr(target_shrinkage, "BLOCK", 7)
    goals = TARGETS if with_metric else torch.linalg.qr(normal(6, 6, seed=4)).Q * 6**0.5  # whose Fisher is I
    own = Interactions.from_features(POOL, goals)
    if not with_metric:
        own = Interactions(own.values, own.features, None, ids=own.ids, weight=1.0)
    a, m = 0.3, len(goals)
    shares = torch.cat([torch.full((m,), (1 - a) / m), torch.full((30,), a / 30)]).double()
    expected = Interactions.from_features(POOL, torch.cat([goals, POOL]), shares=shares)
    found = with_pool(own, a)
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(found.metric, expected.metric)
    assert with_pool(own, 0.0) is own


@pytest.mark.parametrize("shrink", [True, False])
def test_rows_are_chosen_by_the_mixed_loss(shrink: bool) -> None:
    """By the dense Newton step, every row tried for every pick."""
    pool = NewtonPool(POOL, TARGETS, shrink=shrink)
    a = by_hand(POOL, TARGETS, [1.0] * 5) if shrink else 0.0
    assert pool.pool_share == pytest.approx(a)
    values = POOL @ ((1 - a) * TARGETS.mean(0) + a * POOL.mean(0))
    metric = (1 - a) * TARGETS.T @ TARGETS / 5 + a * POOL.T @ POOL / 30
    expected = oracles.newton_greedy(values, POOL, metric, 6, range(30), oracles.newton_damping(POOL, 0.2))
    assert list(pool.select(6, NewtonGreedy(0.2), screen=False).positions) == expected


def test_fewer_targets_are_shrunk_more_than_all_of_them() -> None:
    """In folds of the targets too, for it is measured on those that are there."""
    pool: Any = NewtonPool(normal(200, 50, seed=5), normal(100, 50, seed=6), shrink=True)
    few = NewtonPool(pool.features, pool.targets[:10], shrink=True)
    assert few.pool_share > 0.8 > pool.pool_share > 0.4


def test_many_targets_are_not_shrunk_by_default() -> None:
    few, many = (NewtonPool(POOL, normal(m, 6, seed=7)) for m in (199, 200))
    for pool, shrink in ((few, True), (many, False)):
        found = pool.select(6, Newton(0.2, screen=False))
        assert found.to_dict() == pool.select(6, Newton(0.2, screen=False, shrink=shrink)).to_dict()
        assert found.gains.tolist() != pool.select(6, Newton(0.2, screen=False, shrink=not shrink)).gains.tolist()
