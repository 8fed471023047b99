from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_influence.capture import ExampleLoader, find_components
from lightning_influence.estimators import projected_dot as module
from lightning_influence.estimators.gradient_dot import GradientDot
from lightning_influence.estimators.projected_dot import ProjectedDot, pair_products
from lightning_influence.projections import FactoredProjection, LoGra, Projection, TrakProjection
from tests.curvature.models import Mixed, Tokens, mlp, normal, points, ready, texts, token_rows

QUERIES, TRAIN = token_rows(4, seed=3), token_rows(9)
PROJECTIONS: dict[str, Projection] = {
    "FactoredProjection": FactoredProjection(40),
    "LoGra": LoGra((2, 3)),
    "TrakProjection": TrakProjection(40),
}


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("per_component", [False, True])
@pytest.mark.parametrize("case", ["mlp", "every kind of layer", "padded text"])
def test_nothing_is_lost_with_as_many_dimensions_as_parameters(case: str, normalise: bool, per_component: bool) -> None:
    build, rows = {
        "mlp": (mlp, points),
        "every kind of layer": (lambda: ready(Mixed()), token_rows),
        "padded text": (lambda: ready(Tokens()), texts),
    }[case]
    model, queries, train = build(), rows(4, seed=3), rows(9)
    expected = GradientDot(model, normalise=normalise).score(queries, train, per_component=per_component)
    estimator = ProjectedDot(model, FactoredProjection(1.0), normalise=normalise, batch_size=4)
    found = estimator.score(queries, train, per_component=per_component)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-10, atol=1e-10)
    assert (found.components, found.train_ids) == (expected.components, expected.train_ids)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_scores_are_products_of_what_is_projected(name: str) -> None:
    estimator = ProjectedDot(ready(Mixed()), PROJECTIONS[name])
    left, right = estimator.project(QUERIES), estimator.project(TRAIN)
    assert left.shape == (4, sum(estimator.sizes.values()))
    torch.testing.assert_close(estimator.score(QUERIES, TRAIN).values, left @ right.T)
    apart = estimator.score(QUERIES, TRAIN, per_component=True)
    for k, part in enumerate(estimator.slices.values()):
        torch.testing.assert_close(apart.values[k], left[:, part] @ right[:, part].T)
    cosines = ProjectedDot(ready(Mixed()), PROJECTIONS[name], normalise=True).score(QUERIES, TRAIN).values
    torch.testing.assert_close(cosines, nn.functional.cosine_similarity(left[:, None], right[None], dim=2))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_right_on_average(name: str) -> None:
    model, seeds = ready(Mixed()), 80
    exact = GradientDot(model).score(QUERIES, TRAIN).values
    cls, settings = type(PROJECTIONS[name]), PROJECTIONS[name].settings()
    twins = [cls(**{**settings, "seed": seed}) for seed in range(seeds)]
    found = torch.stack([ProjectedDot(model, twin).score(QUERIES, TRAIN).values.double() for twin in twins])
    assert ((found.mean(0) - exact).abs() < 4.5 * found.std(0) / seeds**0.5).all()


@pytest.mark.parametrize("name", PROJECTIONS)
def test_order_and_batches_do_not_matter(name: str) -> None:
    model = ready(Mixed())
    expected = ProjectedDot(model, PROJECTIONS[name]).project(TRAIN)
    order = [4, 8, 0, 2, 6, 1, 7, 3, 5]
    for size in (1, 4, 9):
        found = ProjectedDot(model, PROJECTIONS[name], batch_size=size).project(ExampleLoader(TRAIN, indices=order))
        torch.testing.assert_close(found, expected[order])


def test_labels() -> None:
    estimator = ProjectedDot(ready(Mixed()), FactoredProjection(40))
    scores = estimator.score(QUERIES, TRAIN)
    assert scores.formula == "<R g_q, R g_i>, R: FactoredProjection to 40 dimensions"
    assert scores.damping is None
    other = ProjectedDot(ready(Mixed()), LoGra((2, 2)), normalise=True).score(QUERIES, TRAIN, labels="sampled")
    assert other.formula == "<R g_q, R g_i>, R: LoGra to 20 dimensions, unit gradients, sampled query labels"


def test_sampled_labels() -> None:
    estimator = ProjectedDot(ready(Mixed()), FactoredProjection(40))
    sampled = estimator.project(QUERIES, labels="sampled", seed=1)
    torch.testing.assert_close(
        estimator.score(QUERIES, TRAIN, labels="sampled", seed=1).values, sampled @ estimator.project(TRAIN).T
    )
    assert not torch.allclose(sampled, estimator.project(QUERIES))


def test_the_projection_given_is_not_changed() -> None:
    projection = FactoredProjection(40)
    estimator = ProjectedDot(ready(Mixed()), projection)
    assert projection.sizes == {}
    assert estimator.projection.total == 40


def test_a_started_projection_keeps_its_dimensions() -> None:
    """So that some components are projected as they are among all."""
    model = ready(Mixed())
    projection = FactoredProjection(40).start(find_components(model))
    whole, part = ProjectedDot(model, projection), ProjectedDot(model, projection, components=["up", "norm"])
    assert part.projection is projection
    assert part.sizes == {name: projection.sizes[name] for name in ("norm", "up")}
    columns = torch.cat([whole.project(TRAIN)[:, whole.slices[name]] for name in ("norm", "up")], dim=1)
    assert torch.equal(part.project(TRAIN), columns)
    assert part.slices["up"].stop == columns.shape[1]
    with pytest.raises(ValueError, match=r"`FactoredProjection.project`: component '0' is not among the 5 components"):
        ProjectedDot(mlp(), projection)


def test_memory_counts_projected_numbers() -> None:
    estimator = ProjectedDot(mlp().float(), FactoredProjection(5), memory_budget=2 * 4 * 5)
    assert [block.ids for block in estimator._query_blocks(ExampleLoader(points(5)))] == [[0, 1], [2, 3], [4]]


def test_narrow_models_are_projected_in_float32() -> None:
    rows = [(x.float(), y) for x, y in points(4)]
    assert ProjectedDot(mlp().float(), FactoredProjection(5)).project(rows).dtype == torch.float32


def test_bad_data_is_named() -> None:
    rows = texts(6)
    rows[4] = {**rows[4], "labels": torch.full((6,), -100)}
    estimator = ProjectedDot(ready(Tokens()), FactoredProjection(20))
    for use in (lambda: estimator.project(rows, supervised=True), lambda: estimator.score(rows, rows)):
        with pytest.raises(ValueError, match=r"1 of 6 queries have no supervised target \(ids \[4\]\)"):
            use()
    projected = estimator.project(rows)
    assert projected[4].count_nonzero() == 0
    pairs = torch.tensor([[4, 4], [4, 0], [0, 0]])
    assert pair_products(projected, projected, pairs, normalise=True).tolist() == [0, 0, pytest.approx(1)]
    broken = points(5)
    broken[3] = (broken[3][0] * torch.nan, broken[3][1])
    with pytest.raises(ValueError, match=r"not finite \(ids \[3\]\)"):
        ProjectedDot(mlp(), FactoredProjection(5)).project(broken)
    with pytest.raises(ValueError, match="the data is empty"):
        ProjectedDot(mlp(), FactoredProjection(5)).project([])
    with pytest.raises(ValueError, match="each of the 2 components"):
        ProjectedDot(mlp(), FactoredProjection(1))


# Pairs


@given(
    q=st.integers(1, 5),
    n=st.integers(1, 5),
    cut=st.integers(1, 6),
    normalise=st.booleans(),
    small=st.booleans(),
    data=st.data(),
)
def test_pairs(q: int, n: int, cut: int, normalise: bool, small: bool, data: st.DataObject) -> None:
    left, right = normal(q, 7), normal(n, 7, seed=1)
    listed = st.tuples(st.integers(0, q - 1), st.integers(0, n - 1))
    pairs = torch.tensor(data.draw(st.lists(listed, max_size=12)), dtype=torch.int64).reshape(-1, 2)
    expected = left @ right.T
    if normalise:
        expected = expected / left.norm(dim=1)[:, None] / right.norm(dim=1)
    expected = expected[pairs[:, 0], pairs[:, 1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", 14 if small else module.CHUNK)
        found = pair_products(left, right, pairs, normalise=normalise)
        slices = {"a": slice(0, cut), "b": slice(cut, 7)}
        apart = pair_products(left, right, pairs, normalise=normalise, slices=slices)
    torch.testing.assert_close(found, expected)
    assert apart.shape == (2, len(pairs))
    torch.testing.assert_close(apart.sum(0), expected)


def test_vectors_of_any_length_have_a_cosine() -> None:
    left = torch.tensor([[1e-30, 1e-30], [1e-44, 0.0], [0.0, 0.0], [1e25, 1e25]])
    found = pair_products(left, left, torch.tensor([[0, 0], [1, 0], [2, 2], [3, 0]]), normalise=True)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5**0.5, 0.0, 1.0]))


@pytest.mark.parametrize(
    ("shapes", "pairs", "message"),
    [
        (
            ((2, 3), (2, 4)),
            torch.zeros(1, 2).long(),
            r"left=\(2, 3\), right=\(2, 4\)\)`: expected \[q, k\] and \[n, k\]",
        ),
        (((3,), (2, 3)), torch.zeros(1, 2).long(), r"left=\(3,\), right=\(2, 3\)\)`: expected"),
        (((2, 3), (2, 3)), torch.zeros(4).long(), r"pairs=\(4,\), torch.int64\)`: expected int64 \[p, 2\]"),
        (((2, 3), (2, 3)), torch.zeros(1, 2), r"pairs=\(1, 2\), torch.float32\)`: expected int64 \[p, 2\]"),
        (((2, 3), (4, 3)), torch.tensor([[1, 3], [2, 0], [0, -1]]), r"\[\[2, 0\], \[0, -1\]\] lie outside 2 x 4"),
    ],
)
def test_pairs_that_do_not_fit(shapes: Any, pairs: Tensor, message: str) -> None:
    left, right = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        pair_products(left, right, pairs)
