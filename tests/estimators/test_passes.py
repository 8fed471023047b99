"""Passes over queries and training examples: in whatever batches and blocks, for every estimator."""

from __future__ import annotations

import re

import pytest
import torch

from lightning_influence import ExampleLoader, GradientDot
from tests.curvature.models import Mixed, Tokens, mlp, points, ready, texts
from tests.estimators.test_base import MEMBERS, QUERIES, TRAIN, influence


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_batch_size_does_not_matter(name: str, batch_size: int) -> None:
    model = ready(Tokens())
    scores = [
        MEMBERS[name](model, texts(9), batch_size=size).score(texts(4, seed=3), texts(9)).values
        for size in (batch_size, None)
    ]
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("memory_budget", [1, 3 * 8 * 111, 10**9])
@pytest.mark.parametrize("per_component", [False, True])
def test_queries_may_be_taken_a_few_at_a_time(name: str, memory_budget: int, per_component: bool) -> None:
    estimator = MEMBERS[name](ready(Mixed()), normalise=True)
    expected = estimator.score(QUERIES, TRAIN, per_component=per_component).values
    estimator.memory_budget = memory_budget
    found = estimator.score(QUERIES, TRAIN, per_component=per_component)
    torch.testing.assert_close(found.values, expected)
    assert found.query_ids == (0, 1, 2, 3)


def test_memory_counts_the_bytes_of_the_model() -> None:
    for model, width in ((mlp(), 8), (mlp().float(), 4)):
        estimator = GradientDot(model, memory_budget=2 * width * 28)  # 28 parameters
        assert [block.ids for block in estimator._query_blocks(ExampleLoader(points(5)))] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("name", MEMBERS)
def test_progress_can_be_switched_off(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    MEMBERS[name](ready(Mixed()), progress=False).score(QUERIES, TRAIN)
    assert re.sub(r"\s", "", capsys.readouterr().err) == ""


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_narrow_models_are_scored_in_float32(name: str, dtype: torch.dtype, tolerance: float) -> None:
    train, queries = points(9), points(3, seed=3)
    expected = MEMBERS[name](mlp(), train).score(queries, train).values
    narrow = [[(x.to(dtype), y) for x, y in rows] for rows in (train, queries)]
    found = MEMBERS[name](mlp().to(dtype), narrow[0]).score(narrow[1], narrow[0]).values
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_the_mean_is_taken_before_the_curvature() -> None:
    """One solve for all queries, and one pass over the training data, within the memory of one query."""
    estimator, solved = influence(ready(Mixed()), memory_budget=1), []
    transform = estimator._transform_queries
    estimator._transform_queries = lambda g: (solved.append(len(g["up"])), transform(g))[1]  # type: ignore[method-assign]
    estimator.score(QUERIES, TRAIN, aggregate="mean")
    assert solved == [1]
