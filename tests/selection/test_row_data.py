from __future__ import annotations

import re

import pytest
import torch

from lightning_influence.curvature import Identity
from lightning_influence.estimators import LossScore, RepresentationSimilarity
from lightning_influence.estimators.factors import Factors
from lightning_influence.selection import (
    BalancedRandom,
    Constraints,
    FacilityLocation,
    NewtonGreedy,
    RedundancyFilter,
    RoundRobin,
    TokenBudget,
    TopK,
)
from lightning_influence.selection.pipeline import select_training_data
from lightning_influence.selection.row_data import checked_embeddings, places, unit_rows
from tests.curvature.models import Tokens, ready, texts


def test_rows_are_found_by_id() -> None:
    assert places("rule", ("b", "a"), ("a", "x", "b")) == [2, 0]
    with pytest.raises(ValueError, match=re.escape("of 1 of 2 rows there is none: id 7. Rows are matched by id")):
        places("rule", (0, 7), range(3))


def test_unit_rows_stand_in_the_order_of_the_ids() -> None:
    pool = Factors.checked(
        "here", torch.zeros(3), torch.tensor([[3.0, 4], [0, 0], [1e200, 1e200]], dtype=torch.float64)
    )
    pool = Factors(pool.values, pool.features, None, (2, 0, 1))
    rows = unit_rows("rule", pool, None, None)
    half = 0.5**0.5
    torch.testing.assert_close(rows, torch.tensor([[0, 0], [half, half], [0.6, 0.8]], dtype=torch.float64))
    own = unit_rows("rule", pool, torch.eye(5), ["x", 1, 0, 2, "y"])
    assert own.argmax(1).tolist() == [2, 1, 3]


def test_what_is_missing_is_named() -> None:
    pool = Factors.checked("here", torch.zeros(2), ids=["a", "b"])
    with pytest.raises(ValueError, match=re.escape("`rule(features=None)`: expected features [n, r], or embeddings")):
        unit_rows("rule", pool, None, None)
    with pytest.raises(ValueError, match="1 of 2 examples have NaN or infinite embeddings: id 'b'"):
        unit_rows("rule", pool, torch.tensor([[1.0], [torch.nan]]), ["a", "b"])


def test_embeddings_are_checked() -> None:
    assert checked_embeddings("rule", [[1.0, 2.0]], None).shape == (1, 2)
    for wrong in (torch.zeros(3), torch.zeros(0, 2), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match=re.escape("`rule(embeddings)`: expected real numbers [n, d], got shape")):
            checked_embeddings("rule", wrong, None)
    with pytest.raises(ValueError, match="expected one id for each of 2 embeddings, all different; got 2 ids, 1"):
        checked_embeddings("rule", torch.zeros(2, 1), ["a", "a"])
    with pytest.raises(ValueError, match="expected embeddings to go with the ids"):
        checked_embeddings("rule", None, ["a"])


@pytest.mark.filterwarnings("ignore:select_training_data")
def test_every_baseline_takes_the_place_of_a_rule() -> None:
    """On the same pool, targets and budget, also where rows of the pool are left out."""
    pool, targets = texts(8), texts(3, seed=5)
    pool[2] = {**pool[2], "labels": torch.full_like(pool[2]["labels"], -100)}
    model, options = ready(Tokens()), {"budget": 3, "curvature": Identity(), "progress": False}
    vectors = RepresentationSimilarity(model, "up").represent(pool)
    scores = LossScore(model).score(targets, pool)
    baselines = [BalancedRandom(["a", "b"] * 4), RoundRobin(scores), RedundancyFilter(0.999, vectors)]
    for rule in (*baselines, FacilityLocation(vectors), FacilityLocation(), RedundancyFilter(1)):
        selection = select_training_data(model, pool, targets, rule=rule, **options)
        assert selection.rule == repr(rule)
        assert len(set(selection.ids)) == 3
        assert 2 not in selection.ids
        assert selection.positions == selection.ids
    by_loss = select_training_data(model, pool, targets, rule=RoundRobin(scores), **options).ids
    assert by_loss == tuple(k for k, _ in scores.top(8) if k != 2)[:3]


TOO_MANY = "expected data for each of the 3 rows of the pool, by position. There is some for 4"


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (FacilityLocation(torch.eye(4)), {}),
        (RedundancyFilter(0.9, torch.eye(4)), {}),
        (RoundRobin(torch.eye(4)), {}),
        (BalancedRandom(["a", "b"] * 2), {}),
        (NewtonGreedy(unseen=torch.ones(4)), {}),
        (TopK(), {"constraints": Constraints(sources=["a"] * 4, min_per_source=0)}),
        (TopK(), {"constraints": Constraints(costs=[1.0] * 4)}),
        (TopK(), {"constraints": Constraints(duplicates="first", duplicate_keys=[1, 2, 3, 4])}),
        (TopK(), {"budget": TokenBudget(2, counts=[1] * 4)}),
    ],
)
def test_data_by_position_of_another_pool(rule, settings) -> None:
    parts = torch.arange(3.0), torch.eye(3)
    with pytest.raises(ValueError, match=re.escape(TOO_MANY)):
        rule.select(*parts, **{"budget": 2, **settings})
    assert set(rule.select(*parts, ids=[3, 1, 2], **{"budget": 2, **settings}).ids) <= {1, 2, 3}


def test_data_by_position_of_another_data_set() -> None:
    model, pool = ready(Tokens()), texts(3)
    for rule, settings in [
        (FacilityLocation(torch.eye(4)), {}),
        (TopK(), {"constraints": Constraints(sources=["a"] * 4, min_per_source=0)}),
        (TopK(), {"budget": TokenBudget(9, counts=[1] * 4)}),
    ]:
        options = {"budget": 1, "curvature": Identity(), "rule": rule, "progress": False, **settings}
        with pytest.raises(ValueError, match=re.escape(TOO_MANY)):
            select_training_data(model, pool, texts(2, seed=1), **options)
