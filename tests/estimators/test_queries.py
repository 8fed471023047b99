from __future__ import annotations

import pytest
import torch

from lightning_influence import (
    EKFAC,
    ClassificationLoss,
    ExampleLoader,
    GradientDot,
    GroupInfluence,
    Identity,
    RegressionLoss,
    select_training_data,
)
from lightning_influence.estimators.queries import (
    asked,
    check_asked,
    check_one_loss,
    check_supervised,
    damping_label,
    row_ids,
    sampled_losses,
    warn_of_flat,
)
from tests.curvature.models import Tokens, loss_of, mlp, points, ready, texts


def test_what_is_asked_is_written_down() -> None:
    queries = ExampleLoader(points(5), indices=[4, 0, 2])
    assert (asked(queries, "data", None), row_ids(queries, None)) == (("", ""), (4, 0, 2))
    assert asked(queries, "sampled", "mean") == ("sampled query labels", "mean loss of 3 queries")
    assert row_ids(queries, "mean") == ("mean",)


def test_what_no_estimator_does() -> None:
    check_asked("X.score", "sampled", None, bilinear=False)
    check_asked("X.score", "data", "mean", bilinear=True)
    with pytest.raises(ValueError, match=r"`X.score\(labels='own'\)`: expected 'data' or 'sampled'."):
        check_asked("X.score", "own", None, bilinear=True)
    with pytest.raises(ValueError, match=r"`X.score\(aggregate='sum'\)`: expected None or 'mean'."):
        check_asked("X.score", "data", "sum", bilinear=True)
    with pytest.raises(ValueError, match=r"`X.score\(aggregate='mean'\)`: scores are not linear in the query's gradi"):
        check_asked("X.score", "data", "mean", bilinear=False)


def test_queries_without_a_target() -> None:
    rows = texts(3)
    check_supervised(ready(Tokens()), ExampleLoader(rows), None)
    rows[1] = {**rows[1], "labels": torch.full((6,), -100)}
    with pytest.raises(ValueError, match=r"1 of 3 queries have no supervised target \(ids \[1\]\); expected at least"):
        check_supervised(ready(Tokens()), ExampleLoader(rows), None)


@pytest.mark.parametrize("seed", [0, 3])
def test_drawn_labels_are_those_of_the_id(seed: int) -> None:
    model, rows = mlp(), points(6)
    expected = torch.stack([loss_of(model, row, k, seed) for k, row in enumerate(rows)])
    for size in (1, 4):
        parts = ExampleLoader(rows, size)
        found = [sampled_losses(ClassificationLoss(), ids, seed)(model, batch) for ids, batch in parts]
        torch.testing.assert_close(torch.cat(found), expected)


def test_damping_is_told() -> None:
    assert damping_label(EKFAC(damping=0.5)) == "0.5"
    assert damping_label(EKFAC(damping_share=0.2)) == "0.2 x mean eigenvalue"
    assert damping_label(Identity()) is None


def test_a_measurement_that_is_flat_everywhere_is_told() -> None:
    flat = GradientDot(mlp(), query_loss=lambda model, batch: model(batch[0]).sign().sum(1))
    with pytest.warns(UserWarning, match=r"GradientDot\(query_loss=...\): the gradient of every query is exactly 0"):
        assert not flat.score(points(3), points(4)).values.any()
    warn_of_flat("x", None, {"a": torch.zeros(2, 3)})
    warn_of_flat("x", flat.query_loss, {"a": torch.zeros(2, 3), "b": torch.ones(2, 1)})


def test_queries_that_the_head_cannot_score_are_named() -> None:
    rows = points(5)
    beyond = [*rows[:4], (rows[4][0], torch.tensor(7))]
    narrow = [(x[:2], y) for x, y in rows]
    estimator = GradientDot(mlp(), batch_size=2, progress=False)
    named = r"Got \[7\]. Met in 1 of 1 queries \(ids \[4\]\)\."
    with pytest.raises(ValueError, match=named):
        estimator.check(beyond)
    shapes = r"cannot be run on 2 of 2 queries \(ids \[0, 1\]\): RuntimeError: mat1 and mat2 .*Expected"
    with pytest.raises(ValueError, match=shapes):
        estimator.check(narrow)
    with pytest.raises(ValueError, match=named.replace("queries", "targets")):
        select_training_data(mlp(), points(6), beyond, budget=2, batch_size=2, progress=False)
    broken = [*rows[:4], (rows[4][0] * torch.nan, rows[4][1])]
    with pytest.raises(ValueError, match=r"the loss of 1 of 1 pool rows is not finite \(ids \[4\]\)"):
        select_training_data(mlp(), broken, points(2, seed=1), budget=2, progress=False)


def test_targets_with_labels_of_another_kind_than_the_pool() -> None:
    model, pool = mlp(), points(6)
    targets = [(x, torch.tensor([0.2, 0.5, 0.3])) for x, _ in pool]
    told = r"by their labels, the pool is to be scored by ClassificationLoss and the targets by RegressionLoss"
    with pytest.raises(ValueError, match=r"`select_training_data\(targets\)`: " + told):
        select_training_data(model, pool, targets, budget=2, progress=False)
    with pytest.raises(ValueError, match=r"`GroupInfluence.fit\(targets\)`: " + told):
        GroupInfluence(model, Identity(), progress=False).fit(pool, targets)
    check_one_loss("here", model, ExampleLoader(pool), ExampleLoader(targets), RegressionLoss())
