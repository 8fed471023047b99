from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence import EKFAC, InfluenceFunction, InteractionGreedy, Interactions, NewtonGreedy
from lightning_influence.selection import (
    NewtonPool,
    gain_curve,
    held_out_pool,
    held_out_ridge,
    held_out_weight,
)
from tests.curvature.models import mlp, normal, points

RIDGES = (0.03, 0.3, 3.0)


def pool_of(n: int = 24, m: int = 9, r: int = 6, seed: int = 0, **options: Any) -> NewtonPool:
    """Rows and targets on one side of the origin, more or less."""
    lean = torch.zeros(r).double()
    lean[0] = 0.7
    return NewtonPool(normal(n, r, seed=seed) + lean, normal(m, r, seed=seed + 1) + lean, **options)


def parts(m: int, folds: int, seed: int) -> list[list[int]]:
    """Held-out targets: a permutation, cut into pieces whose sizes differ by at most one."""
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = [m // folds + (fold < m % folds) for fold in range(folds)]
    return [order[sum(sizes[:fold]) : sum(sizes[: fold + 1])] for fold in range(folds)]


def explained(pool: NewtonPool, rows: Sequence[int], ridge: float, targets: Sequence[int]) -> Tensor:
    """1 − (1 − φ_tᵀw)² of each target, from the matrix that is inverted."""
    features, n = pool.features, len(pool.features)
    unseen = torch.zeros(n).double() if pool.unseen is None else pool.unseen
    scale = ridge * float(features.square().sum() + unseen.sum()) / n
    chosen = features[list(rows)]
    matrix = chosen @ chosen.T + torch.diag(scale + unseen[list(rows)])
    w = chosen.T @ torch.linalg.inv(matrix) @ torch.ones(len(rows)).double()
    return torch.stack([1 - (1 - pool.targets[t] @ w) ** 2 for t in targets])


def without(pool: NewtonPool, held_out: Sequence[int]) -> NewtonPool:
    kept = [t for t in range(len(pool.targets)) if t not in held_out]
    shares = None if pool.shares is None else pool.shares[kept]
    drawn = None if pool.curvature_targets is None else pool.curvature_targets[kept]
    return replace(pool, targets=pool.targets[kept], shares=shares, curvature_targets=drawn)


OPTIONS = [
    {},
    {"unseen": torch.linspace(0, 2, 24).double()},
    {"shares": torch.tensor([1.0, 2, 3, 0.5, 1, 1, -0.5, 2, 1]).double()},
    {"curvature_targets": normal(9, 6, seed=7)},
]


@pytest.mark.parametrize("screen", [False, True])
@pytest.mark.parametrize("folds", [2, 4, 9])
@pytest.mark.parametrize("options", OPTIONS)
def test_ridges_are_measured_on_targets_that_the_rows_were_not_selected_by(
    options: dict[str, Any], folds: int, screen: bool
) -> None:
    pool, k = pool_of(**options), 6
    choice = held_out_ridge(pool, k, ridges=RIDGES, folds=folds, seed=5, screen=screen)
    counts = torch.ones(9).double() if pool.shares is None else pool.shares
    expected = torch.zeros(3, k).double()
    for held_out in parts(9, folds, 5):
        for row, ridge in enumerate(RIDGES):
            known = without(pool, held_out)
            known = known.screened(k) if screen else known
            picks = known.interactions.select(known.rule(k, NewtonGreedy(ridge)), k).positions
            for size in range(1, k + 1):
                gains = explained(replace(known, targets=pool.targets), picks[:size], ridge, held_out)
                expected[row, size - 1] += counts[held_out] @ gains / counts.abs().sum()
    torch.testing.assert_close(choice.explained, expected, rtol=1e-8, atol=1e-11)
    assert choice.candidates == RIDGES
    assert choice.best == RIDGES[int(expected[:, -1].argmax())]
    assert torch.equal(choice.curve, choice.explained[int(expected[:, -1].argmax())])


def test_what_is_explained_is_what_the_selection_says_of_its_own_targets() -> None:
    """With the same targets on either side, the curve is that of the gains: J = −½ · explained."""
    pool = pool_of()
    both = replace(pool, targets=torch.cat([pool.targets, pool.targets]))
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    twins = torch.empty(18, dtype=torch.long)
    twins[order] = torch.arange(18) % 9  # each part has every target once
    choice = held_out_ridge(replace(both, targets=pool.targets[twins]), 6, ridges=(0.3,), folds=2, screen=False)
    selection = pool.interactions.select(NewtonGreedy(0.3), 6)
    torch.testing.assert_close(choice.curve, -2 * selection.gains.cumsum(0))
    torch.testing.assert_close(choice.curve / choice.curve.max(), gain_curve(selection))


@pytest.mark.parametrize("folds", [3, 9])
def test_weights_are_measured_on_targets_that_the_rows_were_not_selected_by(folds: int) -> None:
    pool, k, weights = pool_of(), 5, (0.01, 0.05, 0.2)
    scores = pool.targets @ pool.features.T
    choice = held_out_weight(scores, k, weights=weights, folds=folds, seed=2)
    expected = torch.zeros(3, k).double()
    for held_out in parts(9, folds, 2):
        kept = [t for t in range(9) if t not in held_out]
        for row, weight in enumerate(weights):
            picks = Interactions.from_scores(scores[kept], weight).select(InteractionGreedy(), k).ids
            for size in range(1, k + 1):
                group = Interactions.from_scores(scores[held_out], weight)
                change = group.estimate([int(pick) for pick in picks[:size]], "addition")
                expected[row, size - 1] -= 2 * change * len(held_out) / 9
    torch.testing.assert_close(choice.explained, expected)
    assert choice.best in weights


def test_weights_by_default_end_where_a_row_is_at_its_optimum_alone() -> None:
    pool = pool_of()
    choice = held_out_weight(pool.targets @ pool.features.T, 4)
    assert len(choice.candidates) == 13
    assert choice.candidates[0] == pytest.approx(1000 * choice.candidates[-1])
    assert list(choice.candidates) == sorted(choice.candidates, reverse=True)
    scaled = held_out_weight(8 * pool.targets @ pool.features.T, 4)
    assert scaled.candidates == pytest.approx([weight / 8 for weight in choice.candidates])
    torch.testing.assert_close(scaled.explained, choice.explained)


@pytest.mark.parametrize("sampled", [False, True])
def test_weights_for_targets_that_do_not_count_alike(sampled: bool) -> None:
    """Rows are selected by the weighted mean of the others; one target is to be avoided, one does not count."""
    pool, k, weights = pool_of(), 5, (0.05, 0.4)
    shares = torch.tensor([1.0, 2, 3, 0.5, 1, 0, -0.5, 2, 1]).double()
    scores = pool.targets @ pool.features.T
    drawn = normal(9, 6, seed=7) @ pool.features.T if sampled else None
    choice = held_out_weight(scores, k, curvature_scores=drawn, shares=shares, weights=weights, folds=4, seed=2)
    expected = torch.zeros(2, k).double()
    counted = [t for t in range(9) if t != 5]
    for places in parts(8, 4, 2):
        held_out = [counted[place] for place in places]
        kept = [t for t in range(9) if t not in held_out]
        fisher = scores if drawn is None else drawn
        values, pairs = shares[kept] @ scores[kept], fisher[kept].T @ (shares[kept, None] * fisher[kept])
        for row, weight in enumerate(weights):
            picks: list[int] = []
            for size in range(1, k + 1):
                changes = [
                    float(-weight * values[s].sum() + 0.5 * weight**2 * pairs[s][:, s].sum())
                    for s in ([*picks, j] for j in range(24))
                ]
                changes = [change if j not in picks else torch.inf for j, change in enumerate(changes)]
                picks.append(int(torch.tensor(changes).argmin()))
                moves = weight * scores[held_out][:, picks].sum(1)
                expected[row, size - 1] += shares[held_out] @ (1 - (1 - moves) ** 2) / shares.abs().sum()
    torch.testing.assert_close(choice.explained, expected)


def test_targets_that_do_not_count_are_no_fold() -> None:
    shares = torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0, 0]).double()
    pool = pool_of(shares=shares)
    scores = pool.targets @ pool.features.T
    assert held_out_ridge(pool, 4, ridges=RIDGES, folds=2).explained.isfinite().all()
    assert held_out_weight(scores, 4, shares=shares, folds=2).best > 0
    for refused in (
        lambda: held_out_ridge(pool, 4, folds=3),
        lambda: held_out_weight(scores, 4, shares=shares, folds=3),
    ):
        with pytest.raises(ValueError, match=r"folds=3\)`: expected an int from 2 to the number of targets, 2"):
            refused()


def test_weights_by_default_are_those_of_rows_that_help() -> None:
    """With a budget that reaches far into a pool where most rows harm, whose optimum would be a weight below 0."""
    scores = torch.cat([torch.ones(4, 3), -torch.ones(4, 20)], dim=1).double()
    assert held_out_weight(scores, 20, folds=2).candidates[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="held_out_weight: no row of the pool is predicted to lower the target loss"):
        held_out_weight(-scores.abs(), 20, folds=2)
    assert held_out_weight(-scores.abs(), 20, weights=(0.1,), folds=2).best == 0.1


@pytest.mark.parametrize("kind", ["ridge", "weight"])
def test_left_out_one_by_one_the_order_of_targets_and_rows_does_not_matter(kind: str) -> None:
    pool = pool_of()
    targets = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    rows = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    shuffled = NewtonPool(pool.features[rows], pool.targets[targets], ids=rows.tolist())

    def choose(one: NewtonPool, seed: int) -> Tensor:
        if kind == "ridge":
            return held_out_ridge(one, 5, ridges=RIDGES, folds=9, seed=seed).explained
        return held_out_weight(one.targets @ one.features.T, 5, folds=9, seed=seed).explained

    torch.testing.assert_close(choose(shuffled, 3), choose(pool, 4))


def test_kinds_of_gradients_are_judged_by_one_of_them() -> None:
    """Unit rows and raw ones: the selections of each, without the part that is held out, by the raw Newton step."""
    data, goals = points(30), points(8, seed=3)
    fits = {
        name: InfluenceFunction(mlp(), EKFAC(), normalise=unit, progress=False).fit(data)
        for name, unit in (("raw", False), ("unit", True))
    }
    pools = {name: NewtonPool.whitened(fit, goals, data) for name, fit in fits.items()}
    for judge in (None, "unit"):
        choice = held_out_pool(pools, 6, judge=judge, folds=4, seed=1)
        measure = pools[judge or "raw"]
        ridge = measure.ridge(6).best
        for row, pool in enumerate(pools.values()):
            expected = 0.0
            for held_out in parts(8, 4, 1):
                picks = without(pool, held_out).select(6).positions
                expected += float(explained(measure, picks, ridge, held_out).sum()) / 8
            assert float(choice.explained[row, -1]) == pytest.approx(expected, rel=1e-6)
        assert choice.candidates == ("raw", "unit")
    assert held_out_pool({"raw": pools["raw"]}, 0.2).explained.shape == (1, 6)


def test_what_cannot_be_held_out_is_refused() -> None:
    pool = pool_of()
    scores = pool.targets @ pool.features.T
    for folds in (1, 10, 2.0, True):
        with pytest.raises(ValueError, match=r"folds=.*an int from 2 to the number of targets, 9"):
            held_out_ridge(pool, 4, folds=folds)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"held_out_ridge\(ridges=\(\)\)`: expected at least one"):
        held_out_ridge(pool, 4, ridges=())
    with pytest.raises(ValueError, match="a finite number > 0"):
        held_out_ridge(pool, 4, ridges=(0.0,))
    with pytest.raises(ValueError, match="one curvature target for each of 9 targets"):
        held_out_ridge(replace(pool, curvature_targets=normal(3, 6)), 4)
    with pytest.raises(ValueError, match=r"`held_out_weight\(scores\)`: expected one curvature target for each of 9"):
        held_out_weight(scores, 4, curvature_scores=scores[:3])
    with pytest.raises(ValueError, match="held_out_ridge"):
        held_out_ridge(pool, 25)
    with pytest.raises(ValueError, match=r"held_out_weight\(weights=\(\)\)"):
        held_out_weight(scores, 4, weights=())
    with pytest.raises(ValueError, match="weight=-1"):
        held_out_weight(scores, 4, weights=(-1,))
    with pytest.raises(ValueError, match="the same rows and targets in every pool, and one of 'a' as the judge"):
        held_out_pool({"a": pool}, 4, judge="b")
    with pytest.raises(ValueError, match=r"Got \(rows, targets\) \[\(20, 9\), \(24, 9\)\]"):
        held_out_pool({"a": pool, "b": pool_of(20)}, 4)
