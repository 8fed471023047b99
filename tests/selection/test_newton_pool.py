from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence import EKFAC, InfluenceFunction, ProjectedGram
from lightning_influence.capture import ExampleLoader
from lightning_influence.errors import StoreError
from lightning_influence.selection import (
    Constraints,
    Newton,
    NewtonGreedy,
    NewtonPool,
    TokenBudget,
    held_out_ridge,
    newton_pool,
)
from lightning_influence.selection.ridge_choice import RIDGES
from lightning_influence.selection.saturation import saturating_ridge
from tests.curvature.models import mlp, normal, points

POOL, TARGETS = points(20), points(6, seed=3)


def fitted(**options: Any) -> InfluenceFunction:
    return InfluenceFunction(mlp(), EKFAC(), **options).fit(POOL)


def products(pool: NewtonPool) -> tuple[Tensor, Tensor]:
    """Targets x pool, pool x pool."""
    return pool.targets @ pool.features.T, pool.features @ pool.features.T


def test_scores_give_exact_products_with_targets() -> None:
    influence = fitted()
    crossed, own = products(NewtonPool.scored(influence, TARGETS, POOL))
    torch.testing.assert_close(crossed, influence.score(TARGETS, POOL).values)
    exact = influence.score(POOL, POOL).values
    assert (own.diagonal() <= exact.diagonal() * (1 + 1e-9)).all()  # a part of each gradient is not seen
    torch.testing.assert_close(products(NewtonPool.scored(influence, POOL, POOL))[1], exact)


@pytest.mark.parametrize("options", [{}, {"normalise": True}, {"batch_size": 7}])
def test_as_many_landmarks_as_rows_give_all_products(options: dict[str, Any]) -> None:
    influence = fitted(**options)
    pool = NewtonPool.scored(influence, TARGETS, POOL, landmarks=len(POOL))
    crossed, own = products(pool)
    torch.testing.assert_close(crossed, influence.score(TARGETS, POOL).values)
    torch.testing.assert_close(own, influence.score(POOL, POOL).values)
    torch.testing.assert_close(pool.targets @ pool.targets.T, influence.score(TARGETS, TARGETS).values)
    assert pool.unseen is not None
    torch.testing.assert_close(pool.unseen, torch.zeros(len(POOL)).double())
    whole = NewtonPool.whitened(influence, TARGETS, POOL)
    rule = NewtonGreedy(0.2)
    assert pool.select(8, rule).ids == whole.select(8, rule).ids


def test_features_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same choice, of rows that are looked at where they lie, a block at a time."""
    monkeypatch.setattr(newton_pool, "BLOCK", 3)
    influence, path = fitted(), tmp_path / "pool.npy"
    whole = NewtonPool.whitened(influence, TARGETS, POOL)
    found = NewtonPool.whitened(influence, TARGETS, POOL, path=path, dtype=torch.float64)
    torch.testing.assert_close(products(found), products(whole))
    torch.testing.assert_close(found.agreement(), whole.agreement())
    torch.testing.assert_close(found.ridge(5).errors, whole.ridge(5).errors)
    for rule in (Newton(), NewtonGreedy(0.2)):
        assert found.select(8, rule).ids == whole.select(8, rule).ids
    half = NewtonPool.whitened(influence, TARGETS, POOL, path=tmp_path / "half.npy")
    assert half.features.dtype == torch.float16
    torch.testing.assert_close(half.agreement(), whole.agreement(), rtol=0.02, atol=0.02)
    with pytest.raises(StoreError, match="dtype: stored"):
        NewtonPool.whitened(influence, TARGETS, POOL, path=path)


def test_landmarks_are_known_in_full() -> None:
    """Their products with every row are exact, those of other rows are short by what is unseen."""
    influence, rows = fitted(), ExampleLoader(POOL, indices=[17, 3, 8, 11, 4, 0, 9, 13, 2, 6, 15, 5])
    pool = NewtonPool.scored(influence, TARGETS, rows, landmarks=5, seed=3)
    exact, (crossed, own) = influence.score(rows, rows).values, products(pool)
    torch.testing.assert_close(crossed, influence.score(TARGETS, rows).values)
    assert pool.unseen is not None
    known = pool.unseen < 1e-9 * exact.diagonal()
    assert int(known.sum()) == 5
    torch.testing.assert_close(own[known], exact[known])
    torch.testing.assert_close(own.diagonal() + pool.unseen, exact.diagonal())
    assert pool.ids == tuple(rows.ids)
    more = NewtonPool.scored(influence, TARGETS, rows, landmarks=9, seed=3)
    assert more.unseen is not None
    assert (more.unseen <= pool.unseen + 1e-9).all()


def test_landmarks_under_sampled_labels() -> None:
    influence = fitted()
    pool = NewtonPool.scored(influence, TARGETS, POOL, landmarks=len(POOL), target_curvature="sampled", seed=4)
    assert pool.curvature_targets is not None
    for rows, features in ((POOL, pool.features), (TARGETS, pool.targets)):
        expected = influence.score(TARGETS, rows, labels="sampled", seed=4).values
        torch.testing.assert_close(pool.curvature_targets @ features.T, expected)


@pytest.mark.parametrize("landmarks", [-1, 21, 2.0, True])
def test_landmarks_are_rows_of_the_pool(landmarks: Any) -> None:
    with pytest.raises(ValueError, match=r"landmarks=.*an int from 0 to the pool's 20 rows"):
        NewtonPool.scored(fitted(), TARGETS, POOL, landmarks=landmarks)


@pytest.mark.parametrize("options", [{}, {"normalise": True}])
def test_scores_know_the_length_of_every_gradient(options: dict[str, Any]) -> None:
    influence = fitted(**options)
    pool = NewtonPool.scored(influence, TARGETS, POOL)
    assert pool.unseen is not None
    lengths = pool.features.square().sum(1) + pool.unseen
    torch.testing.assert_close(lengths, influence.score(POOL, POOL).total().diagonal())
    assert (pool.unseen > 1e-6).all()


def test_a_rule_is_told_what_the_features_leave_out() -> None:
    rows = ExampleLoader(POOL, indices=[3, 8, 11, 4])
    pool = NewtonPool.scored(fitted(), TARGETS, rows)
    assert pool.unseen is not None
    told = pool.rule(3, NewtonGreedy(0.2))
    assert (told.ridge, told.ids) == (0.2, pool.ids)
    assert torch.equal(told.unseen, pool.unseen)
    assert torch.equal(pool.rule(3).unseen, pool.unseen)
    own = NewtonGreedy(0.2, torch.zeros(12))
    assert pool.rule(3, own) is own
    assert NewtonPool.whitened(fitted(), TARGETS, rows).rule(3).unseen is None


@pytest.mark.parametrize("options", [{}, {"normalise": True}, {"batch_size": 7}])
def test_gradients_give_all_products(options: dict[str, Any]) -> None:
    influence = fitted(**options)
    crossed, own = products(NewtonPool.whitened(influence, TARGETS, POOL))
    torch.testing.assert_close(crossed, influence.score(TARGETS, POOL).values)
    torch.testing.assert_close(own, influence.score(POOL, POOL).values)


def test_projected_gradients() -> None:
    influence = InfluenceFunction(mlp(), ProjectedGram((2, 2))).fit(POOL)
    pool = NewtonPool.whitened(influence, TARGETS, POOL)
    assert pool.features.shape == (20, 8)
    torch.testing.assert_close(products(pool)[0], influence.score(TARGETS, POOL).values)


def test_the_fisher_of_sampled_labels() -> None:
    influence = fitted()
    pool = NewtonPool.scored(influence, TARGETS, POOL, target_curvature="sampled", seed=4)
    sampled = influence.score(TARGETS, POOL, labels="sampled", seed=4).values
    full = NewtonPool.whitened(influence, POOL + TARGETS, POOL)  # spans everything
    assert pool.curvature_targets is not None
    own = influence.score(TARGETS, TARGETS, labels="sampled", seed=4).values
    torch.testing.assert_close(pool.curvature_targets @ pool.targets.T, own)
    wide = NewtonPool.scored(influence, POOL + TARGETS, POOL, target_curvature="sampled", seed=4)
    assert wide.curvature_targets is not None
    assert full.features.shape[0] == 20
    everything = influence.score(POOL + TARGETS, POOL, labels="sampled", seed=4).values
    torch.testing.assert_close(wide.curvature_targets @ wide.features.T, everything)
    assert not torch.allclose(sampled, influence.score(TARGETS, POOL).values)


def test_ids_are_those_of_the_loader() -> None:
    rows = ExampleLoader(POOL, indices=[3, 8, 11, 4])
    for make in (NewtonPool.scored, NewtonPool.whitened):
        assert set(make(fitted(), TARGETS, rows).select(4, NewtonGreedy()).ids) == {3, 8, 11, 4}


@pytest.mark.parametrize(("n", "k"), [(30, 5), (30, 30), (12, 12)])
@pytest.mark.parametrize("unseen", [None, normal(30, seed=5).square()])
def test_errors_are_those_of_random_rows(n: int, k: int, unseen: Tensor | None) -> None:
    """One dense Newton step for each draw and ridge, whichever of rows and columns are fewer."""
    left_out = torch.zeros(n).double() if unseen is None else unseen[:n]
    pool = NewtonPool(normal(n, 8), normal(5, 8, seed=1), unseen=None if unseen is None else left_out)
    found = pool.ridge(k, draws=3, seed=7)
    assert found.ridges == RIDGES
    generator = torch.Generator().manual_seed(7)
    expected = torch.zeros(len(RIDGES)).double()
    for _ in range(3):
        rows = torch.randperm(n, generator=generator)[:k]
        chosen = pool.features[rows]
        for at, ridge in enumerate(found.ridges):
            damping = ridge * float((pool.features.square().sum(1) + left_out).mean())
            kernel = chosen @ chosen.T + (damping + left_out[rows]).diag()
            w = chosen.T @ torch.linalg.solve(kernel, torch.ones(k).double())
            expected[at] += (1 - pool.targets @ w).square().mean() / 3
    torch.testing.assert_close(found.errors, expected)


def test_errors_count_as_the_targets_do() -> None:
    features, targets = normal(30, 8), normal(3, 8, seed=1)
    shares = torch.tensor([0.4, -0.1, 0.5]).double()
    parts = [NewtonPool(features, targets[k : k + 1]).ridge(5).errors for k in range(3)]
    found = NewtonPool(features, targets, shares=shares).ridge(5).errors
    torch.testing.assert_close(found, sum(share.abs() * part for share, part in zip(shares, parts, strict=True)))


def test_noise_asks_for_a_larger_ridge() -> None:
    """Rows of the constant 1 in few directions: with signs turned at random, a step must average over more of them."""
    directions, targets = normal(6, 6).repeat(40, 1), normal(6, 6)
    clean = directions + 0.05 * normal(240, 6, seed=1)
    signs = torch.where(torch.rand(240, 1, generator=torch.Generator().manual_seed(2)) < 0.3, -1.0, 1.0).double()
    assert NewtonPool(clean * signs, targets).ridge(12).best > NewtonPool(clean, targets).ridge(12).best


def test_selecting_without_a_rule_takes_the_ridge_that_was_found() -> None:
    names = [f"row {k:02}" for k in range(30)]
    pool = NewtonPool(normal(30, 8), normal(5, 8, seed=1), ids=names, shrink=True)
    selection = pool.select(0.2, screen=False)
    assert len(selection) == 6
    assert selection.to_dict() == pool.select(6, NewtonGreedy(pool.ridge(6).best), screen=False).to_dict()
    ridge = pool.screened(6).ridge(6).nearly(0.95)
    assert pool.select(6).to_dict() == pool.select(6, NewtonGreedy(ridge)).to_dict()
    assert pool.rule(6).ridge == pool.ridge(6).best == pool.ridge(6).nearly(0.9)
    assert pool.select(6, NewtonGreedy(7.0)).rule == "NewtonGreedy(ridge=7.0)"
    with pytest.raises(ValueError, match=r"`NewtonPool.select\(budget=31\)`: .* The pool has 30 rows"):
        pool.select(31)


def test_the_rule_for_short_training_begins_with_the_ridge_that_was_found() -> None:
    pool = NewtonPool.scored(fitted(normalise=True), TARGETS, POOL)
    short, found = pool.saturating_rule(0.25), pool.rule(5)
    assert short.ridge >= found.ridge
    assert short.ridge == saturating_ridge(pool.interactions, found, 5).ridge
    assert torch.equal(short.unseen, pool.unseen)
    with pytest.raises(ValueError, match=r"NewtonPool.saturating_rule"):
        pool.saturating_rule(21)


@pytest.mark.parametrize("unseen", [None, normal(12, seed=5).square()])
@pytest.mark.parametrize("shares", [None, torch.tensor([0.5, -0.2, 0.7])])
@pytest.mark.parametrize("block", [4096, 5])
def test_agreement_is_that_of_all_others(
    unseen: Tensor | None, shares: Tensor | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dense regression of the constant 1 without each row in turn."""
    monkeypatch.setattr(newton_pool, "BLOCK", block)
    pool = NewtonPool(normal(12, 5), normal(3, 5, seed=1), unseen=unseen, shares=shares)
    left_out = torch.zeros(12).double() if unseen is None else unseen
    damping = 0.7 * float((pool.features.square().sum(1) + left_out).mean())
    goals = pool.targets if shares is None else pool.targets[[0, 2]]
    rows, dampings = torch.cat([pool.features, goals]), torch.cat([left_out, torch.zeros(len(goals))]) + damping
    found = pool.agreement(0.7)
    for row in range(12):
        others = [other for other in range(len(rows)) if other != row]
        weights = torch.linalg.solve(
            rows[others] @ rows[others].T + dampings[others].diag(), torch.ones(len(others)).double()
        )
        torch.testing.assert_close(found[row], rows[row] @ rows[others].T @ weights)


def flipped(n: int, wrong: int) -> NewtonPool:
    """Rows near a few directions, some of the first ones turned round."""
    signs = torch.ones(n).double()
    signs[:wrong] = -1
    directions = normal(4, 16)
    rows = directions.repeat(n // 4, 1) + 0.1 * normal(n, 16, seed=1)
    return NewtonPool(rows * signs[:, None], directions, ids=[f"row {k}" for k in range(n)])


def test_rows_that_the_others_contradict() -> None:
    pool = flipped(40, wrong=6)
    agreement = pool.agreement()
    assert (agreement < 0).nonzero().flatten().tolist() == list(range(6))
    assert pool.opposed(10).tolist() == agreement.argsort()[:9].tolist()  # half as many again
    assert not len(flipped(40, wrong=0).opposed(10))
    assert pool.opposed(38).tolist() == pool.opposed(10)[:2].tolist()
    assert not len(pool.opposed(1.0))


def test_a_selection_leaves_them_out_while_others_are_left() -> None:
    pool = flipped(40, wrong=6)
    chosen = pool.select(0.85)
    assert set(chosen.positions) == set(range(6, 40))
    assert chosen.ids == tuple(f"row {position}" for position in chosen.positions)
    assert len(pool.select(36).ids) == 36
    assert set(pool.select(40).positions) == set(range(40))
    anonymous = NewtonPool(pool.features, pool.targets).select(34)
    assert anonymous.ids == anonymous.positions == chosen.positions


def test_without_a_screen_the_rule_sees_every_row() -> None:
    pool, rule = flipped(40, wrong=6), NewtonGreedy(0.2)
    assert pool.select(40, rule, screen=False).ids == pool.interactions.select(rule, 40).ids
    told = NewtonPool(pool.features, pool.targets, unseen=torch.ones(40).double())
    assert set(told.select(30, rule).positions) <= set(range(6, 40))


TWO_EACH = {f"row {k}": 2 for k in range(40)}


@pytest.mark.parametrize("folds", [2, 4])
@pytest.mark.parametrize("screen", [None, True, False])
def test_the_ridge_by_held_out_targets_is_that_of_the_function(folds: int, screen: bool | None) -> None:
    """Each fold is screened by the targets that it keeps, the selection itself by all of them."""
    pool = replace(flipped(40, 8), shrink=True)
    rule, without = Newton("held-out", folds=folds), Constraints(exclude=["row 30"])
    choice = held_out_ridge(pool, 10, folds=folds, screen=screen is not False)
    expected = pool.select(10, NewtonGreedy(choice.best), screen=screen)
    found = pool.select(10, rule, screen=screen)
    assert (found.ids, found.rule, found.screened) == (expected.ids, expected.rule, expected.screened)
    assert (found.screened > 0) == (screen is not False)
    assert found.held_out is not None
    assert expected.held_out is None
    assert found.held_out.to_dict() == choice.to_dict()
    told = pool.select(TokenBudget(20, counts=TWO_EACH), rule, screen=screen, constraints=without)
    assert told.held_out is not None
    assert torch.equal(told.held_out.explained, choice.explained)
    assert (len(told), "row 30" in told.ids) == (10, False)


def test_more_folds_than_targets() -> None:
    with pytest.raises(ValueError, match=r"folds=7\)`: expected an int from 2 to the number of targets, 6"):
        NewtonPool(normal(9, 4), normal(6, 4)).select(3, Newton("held-out", folds=7))
