from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import (
    EKFAC,
    Estimator,
    Exact,
    ExampleLoader,
    FactoredProjection,
    GradientDot,
    InfluenceFunction,
    ProjectedDot,
)
from lightning_influence.estimators import CKA, MultiStageInfluence
from lightning_influence.estimators.self_influence import self_products
from tests import oracles
from tests.curvature.models import Mixed, Tokens, loss_of, mlp, points, ready, texts, token_rows


def ekfac(model: nn.Module, data: Any, **options: Any) -> Estimator:
    return InfluenceFunction(model, EKFAC(fisher="empirical"), **options).fit(data)


def exact(model: nn.Module, data: Any, **options: Any) -> Estimator:
    return InfluenceFunction(model, Exact(fisher="empirical"), **options).fit(data)


MEMBERS: dict[str, Any] = {
    "EKFAC": ekfac,
    "Exact": exact,  # couples components
    "GradientDot": lambda model, data, **options: GradientDot(model, **options),
    "ProjectedDot": lambda model, data, **options: ProjectedDot(model, FactoredProjection(0.5), **options),
}
CASES: dict[str, Any] = {
    "every kind of layer": (lambda: ready(Mixed()), lambda: token_rows(9)),
    "padded text": (lambda: ready(Tokens()), lambda: texts(9)),
}


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("normalise", [False, True])
def test_the_diagonal_of_the_scores(name: str, case: str, normalise: bool) -> None:
    model, data = (make() for make in CASES[case])
    estimator = MEMBERS[name](model, data, normalise=normalise, batch_size=4)
    found = estimator.self_influence(data)
    apart = estimator.self_influence(data, per_component=True)
    dense = estimator.score(data, data, per_component=True)
    torch.testing.assert_close(found.values[0], dense.total().diagonal())
    torch.testing.assert_close(apart.values[:, 0], dense.values.diagonal(dim1=1, dim2=2))
    assert (found.values > 0).all()
    assert (apart.components, found.components) == (dense.components, None)
    assert (found.query_ids, found.train_ids) == (("itself",), tuple(range(9)))
    assert (found.reduction, found.damping) == (dense.reduction, dense.damping)
    assert found.formula == f"{dense.formula}, each example on itself"


def test_it_is_the_definition() -> None:
    model, data = mlp(), points(15)
    parameters = dict(model.named_parameters())
    rows = oracles.example_gradients(parameters, lambda k: loss_of(model, data[k], k), len(data))
    g = torch.cat([value.flatten(1) for value in rows.values()], dim=1)
    expected = (g @ oracles.damped_inverse(oracles.fisher(g)) * g).sum(1)
    torch.testing.assert_close(exact(model, data).self_influence(data).values[0], expected)


@pytest.mark.parametrize("memory_budget", [1, 3 * 8 * 111, 10**9])
@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_gradients_are_formed_a_few_at_a_time(memory_budget: int, batch_size: int) -> None:
    model, data, sizes = ready(Mixed()), token_rows(9), []
    estimator = ekfac(model, data)
    expected = estimator.score(data, data).values.diagonal()
    estimator.memory_budget, estimator.batch_size = memory_budget, batch_size
    transform = estimator.transform

    def noted(gradients: Any) -> dict[str, Tensor]:
        sizes.append(len(next(iter(gradients.values()))))
        return transform(gradients)

    estimator.transform = noted  # type: ignore[method-assign]
    torch.testing.assert_close(estimator.self_influence(data).values[0], expected)
    assert sum(sizes) == 9
    assert max(sizes) == min({1: 1, 3 * 8 * 111: 3}.get(memory_budget, 9), batch_size)


@pytest.mark.parametrize("case", CASES)
def test_lengths_from_factors_are_lengths_of_gradients(case: str) -> None:
    model, data = (make() for make in CASES[case])
    estimator = GradientDot(model)
    with estimator.capture:
        [pairs] = [list(pairs) for pairs in estimator._records(estimator._loader(data), "")]
        records = {component.name: record for component, record in pairs}
        found = estimator._self_products(records)
        torch.testing.assert_close(found, self_products(records, dict, 10**9))


def test_a_loader_and_its_order() -> None:
    model, data = mlp(), points(6)
    whole = ekfac(model, data).self_influence(data)
    some = ekfac(model, data).self_influence(ExampleLoader(data, 2, indices=[4, 1, 5]))
    assert some.train_ids == (4, 1, 5)
    torch.testing.assert_close(some.values, whole.values[:, [4, 1, 5]])


def test_an_example_without_any_gradient_does_nothing() -> None:
    rows = texts(6)
    rows[4] = {**rows[4], "labels": torch.full((6,), -100)}
    for normalise in (False, True):
        values = ekfac(ready(Tokens()), rows, normalise=normalise).self_influence(rows).values[0]
        assert values[4] == 0
        assert (values[[0, 1, 2, 3, 5]] > 0).all()


def test_where_there_is_no_such_product() -> None:
    model = mlp()
    two = MultiStageInfluence(model, model, EKFAC(), EKFAC(), components=lambda name, module: True)
    for estimator in (CKA(model), two):
        name = type(estimator).__name__
        with pytest.raises(ValueError, match=rf"`{name}.self_influence\(train\)`: an example has no product with its"):
            estimator.self_influence(points(3))
        with pytest.raises(ValueError, match=rf"`{name}.score_with_self\(queries, train\)`: an example has no product"):
            estimator.score_with_self(points(3), points(3))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("memory_budget", [1, 10**9])
def test_both_from_one_pass(case: str, memory_budget: int) -> None:
    """The numbers and labels of two calls; blocks of queries do not repeat the second."""
    model, data = (make() for make in CASES[case])
    queries = [data[k] for k in (2, 5, 7)]
    estimator = ekfac(model, data, normalise=True, batch_size=4, memory_budget=memory_budget)
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, inputs: seen.append(1))
    found = estimator.score_with_self(queries, data, labels="sampled", seed=2)
    handle.remove()
    expected = estimator.score(queries, data, labels="sampled", seed=2), estimator.self_influence(data)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.values, other.values)
        labels = ("query_ids", "train_ids", "formula", "reduction", "components", "damping")
        assert [getattr(one, name) for name in labels] == [getattr(other, name) for name in labels]
    blocks = 3 if memory_budget == 1 else 1
    assert len(seen) == blocks * 3 + (3 if blocks == 3 else 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("queries", [1, 2, 10**6])
def test_queries_of_two_kinds_in_one_pass(case: str, queries: int) -> None:
    """Blocks begin in one and end in the other; neither is put into batches with the other."""
    model, data = (make() for make in CASES[case])
    few, more = [data[k] for k in (2, 5, 7)], ExampleLoader(data, 2, indices=[8, 0, 1, 6])
    sizes = {"normalise": True, "batch_size": None}
    one = ekfac(model, data, **sizes)
    estimator = ekfac(model, data, **sizes, memory_budget=queries * one._query_numel() * 8)
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, inputs: seen.append(1))
    found, squares = estimator.score_with_self(few, data, also=more)
    handle.remove()
    expected = torch.cat([one.score(few, data).values, one.score(more, data).values])
    torch.testing.assert_close(found.values, expected)
    torch.testing.assert_close(squares.values, one.self_influence(data).values)
    assert found.query_ids == (0, 1, 2, 8, 0, 1, 6)
    passes = {1: 7, 2: 4, 10**6: 1}[queries]  # over the data, which is one batch
    assert len(seen) == passes + {1: 7, 2: 5, 10**6: 3}[queries]
