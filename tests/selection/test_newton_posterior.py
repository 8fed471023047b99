"""What the rows chosen leave of the others, against dense matrices."""

from __future__ import annotations

import pytest
import torch

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.newton_posterior import Posterior, Shrinkage, newton_gains
from tests import oracles
from tests.curvature.models import normal


def pool_of(n: int = 12, r: int = 5, metric: bool = True) -> Factors:
    half = normal(r, r, seed=3)
    return Factors.checked("f", normal(n, seed=1), normal(n, r), half @ half.T if metric else None)


def dense(pool: Factors, rows: list[int], dampings: torch.Tensor) -> torch.Tensor:
    """P of some rows."""
    assert pool.features is not None
    chosen = pool.features[rows]
    weighed = chosen.T @ (chosen / dampings[rows, None])
    return torch.linalg.inv(torch.eye(chosen.shape[1]).double() + weighed)


def posterior(pool: Factors, dampings: torch.Tensor, rows: list[int], left: Shrinkage) -> Posterior:
    """Row by row."""
    assert pool.features is not None
    state = Posterior(pool, dampings)
    for row in rows:
        column = left(pool.features[row])
        overlap, bent = pool.products(torch.stack([column, left(pool.lift(column))], dim=1)).unbind(1)
        left.attempt(column[None] / (dampings[row] + overlap[row]).sqrt())
        left.keep(1)
        state.add(row, column, overlap, bent)
    return state


@pytest.mark.parametrize("metric", [True, False])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 9])  # fewer rows than columns, as many, and more
def test_it_is_the_definition(metric: bool, count: int) -> None:
    pool, dampings, rows = pool_of(metric=metric), normal(12, seed=2).square() + 0.1, [7, 2, 11, 0, 5, 9, 3, 1, 8]
    assert pool.features is not None
    rows, left, features = rows[:count], Shrinkage(pool.shift([])), pool.features
    state, p = posterior(pool, dampings, rows, left), dense(pool, rows, dampings)
    torch.testing.assert_close(left(features), features @ p)
    torch.testing.assert_close(left(features[3]), p @ features[3])
    m = torch.eye(5).double() if pool.metric is None else pool.metric
    w = p @ (features[rows].T @ (1 / dampings[rows]))
    reached = features @ p
    torch.testing.assert_close(state.moved, w)
    torch.testing.assert_close(state.predicted, features @ w)
    torch.testing.assert_close(state.size, (reached * features).sum(1))
    torch.testing.assert_close(state.bend, (reached @ m * reached).sum(1))
    kernel = features @ features[rows].T
    explained = kernel @ torch.linalg.solve(kernel[rows] + dampings[rows].diag(), pool.values[rows])
    torch.testing.assert_close(state.slope, pool.values - explained - reached @ (m @ w))


def test_rows_that_are_tried_can_be_dropped() -> None:
    pool, left = pool_of(), Shrinkage(torch.zeros(5).double())
    assert pool.features is not None
    rows = normal(6, 5, seed=7) / 10
    for kept, tried in ((rows[:2], rows[2:4]), (rows[:5], rows[5:6])):  # the second multiplies out
        left.keep(0)
        before = left(pool.features)
        left.attempt(tried)
        assert not torch.allclose(left(pool.features), before)
        left.keep(0)
        assert torch.equal(left(pool.features), before)
        left.attempt(kept)
        inside = left(pool.features)
        left.keep(len(kept))
        torch.testing.assert_close(left(pool.features), inside)


def test_a_part_goes_on_by_itself() -> None:
    pool, dampings = pool_of(), torch.full((12,), 0.3).double()
    assert pool.features is not None
    state, rows = posterior(pool, dampings, [4, 8], Shrinkage(pool.shift([]))), torch.tensor([9, 2, 5])
    part, before = state.part(rows), state.bend.clone()
    admission, everything = Admission.of_rows(pool, 3), torch.ones(12, dtype=torch.bool)
    whole = state.best(admission, everything)[2]
    torch.testing.assert_close(part.best(admission, everything[rows], rows)[2], whole[rows])
    column = normal(5)
    part.add(1, column, pool.features[rows] @ column, torch.ones(3).double())
    assert torch.equal(state.bend, before)
    assert state.chosen == 2


@pytest.mark.parametrize("together", [1, 3, 128])
def test_gains_are_differences_of_the_objective(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_influence.selection.newton_posterior._TOGETHER", together)
    pool, rows = pool_of(12, 5), [7, 2, 11, 0, 5, 9, 3, 1, 8]
    dampings = normal(12, seed=2).square() + 0.1
    assert pool.features is not None
    first_order, interaction = newton_gains(pool, torch.tensor(rows), dampings[rows])
    truth = [oracles.newton_objective(pool.values, pool.features, pool.metric, rows[:k], dampings) for k in range(10)]
    torch.testing.assert_close(first_order + interaction, torch.tensor(truth).double().diff())
    assert (interaction >= 0).all()  # ½ c² · bend of a metric without negative eigenvalues
