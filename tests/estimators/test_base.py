"""The laws of the family, for every member."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_influence import (
    EKFAC,
    ClassificationLoss,
    Estimator,
    Exact,
    ExampleLoader,
    FactoredProjection,
    GradientDot,
    InfluenceFunction,
    LanguageModelLoss,
    ProjectedDot,
    RegressionLoss,
    estimators,
)
from lightning_influence.estimators import CKA, MultiStageInfluence
from lightning_influence.estimators.base import check_supervised
from tests import oracles
from tests.curvature.models import Mixed, Tokens, loss_of, mlp, normal, points, ready, texts, token_rows

Build = Callable[..., Estimator]
TRAIN, QUERIES = token_rows(9), token_rows(4, seed=3)


def everything(name: str, module: nn.Module) -> bool:
    return True


def influence(model: nn.Module, train: Any = TRAIN, **options: Any) -> InfluenceFunction:
    return InfluenceFunction(model, EKFAC(fisher="empirical"), **options).fit(train)


def two_stages(model: nn.Module, train: Any = TRAIN, components: Any = everything, **options: Any) -> Estimator:
    """Of one model, whose heads and normalisation are asked for by name."""
    stages = [EKFAC(fisher="empirical") for _ in range(2)]
    options["query_loss"] = options.get("loss")
    return MultiStageInfluence(model, model, *stages, components=components, **options).fit(train, train)


MEMBERS: dict[str, Build] = {
    "CKA": lambda model, train=TRAIN, **options: CKA(model, **options),
    "GradientDot": lambda model, train=TRAIN, **options: GradientDot(model, **options),
    "InfluenceFunction": influence,
    "MultiStageInfluence": two_stages,
    "ProjectedDot": lambda model, train=TRAIN, **options: ProjectedDot(model, FactoredProjection(1.0), **options),
}


def test_the_list_holds_every_member() -> None:
    public = [getattr(estimators, name) for name in estimators.__all__]
    members = [c for c in public if isinstance(c, type) and issubclass(c, Estimator) and c is not Estimator]
    assert {c.__name__ for c in members} == set(MEMBERS)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("normalise", [False, True])
def test_components_add_up_to_the_total(name: str, normalise: bool) -> None:
    estimator = MEMBERS[name](ready(Mixed()), normalise=normalise)
    apart = estimator.score(QUERIES, TRAIN, per_component=True)
    assert apart.components == tuple(c.name for c in estimator.components)
    assert apart.values.shape == (5, 4, 9)
    torch.testing.assert_close(apart.total(), estimator.score(QUERIES, TRAIN).values)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_component_alone_gives_its_part(name: str) -> None:
    model = ready(Mixed())
    whole = MEMBERS[name](model).score(QUERIES, TRAIN, per_component=True)
    alone = MEMBERS[name](model, components=["up", "norm"]).score(QUERIES, TRAIN)
    torch.testing.assert_close(alone.values, whole.total(["up", "norm"]))


@pytest.mark.parametrize("name", MEMBERS)
def test_permuting_the_data_permutes_the_scores(name: str) -> None:
    estimator = MEMBERS[name](ready(Mixed()), normalise=True)
    rows, columns = [2, 0, 3, 1], [4, 8, 0, 2, 6, 1, 7, 3, 5]
    expected = estimator.score(QUERIES, TRAIN)
    left, right = ExampleLoader(QUERIES, 2, indices=rows), ExampleLoader(TRAIN, 4, indices=columns)
    found = estimator.score(left, right)
    assert (found.query_ids, found.train_ids) == (tuple(rows), tuple(columns))
    torch.testing.assert_close(found.values, expected.values[rows][:, columns])


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("seed", [0, 4])
def test_sampled_labels_of_the_queries(name: str, seed: int) -> None:
    """As the Fisher of the queries needs them: drawn from the model, the same for an id in any batch."""
    model, estimator = ready(Mixed()), MEMBERS[name](ready(Mixed()))
    found = estimator.score(QUERIES, TRAIN, labels="sampled", seed=seed)
    assert found.formula == f"{estimator.formula}, sampled query labels"
    drawn = [(tokens, _drawn(model, tokens, k, seed)) for k, (tokens, _) in enumerate(QUERIES)]
    torch.testing.assert_close(found.values, estimator.score(drawn, TRAIN).values)
    other = estimator.score(ExampleLoader(QUERIES, 1), TRAIN, labels="sampled", seed=seed)
    torch.testing.assert_close(found.values, other.values)


def _drawn(model: nn.Module, tokens: Tensor, k: int, seed: int) -> Tensor:
    """The label under which the loss is the sampled one."""
    model.requires_grad_(False)
    losses = [float(loss_of(model, (tokens, torch.tensor(label)), k)) for label in range(7)]
    sampled = float(loss_of(model, (tokens, torch.tensor(0)), k, seed))
    return torch.tensor(min(range(7), key=lambda label: abs(losses[label] - sampled)))


@pytest.mark.parametrize("name", MEMBERS)
def test_data_may_be_a_loader(name: str) -> None:
    estimator = MEMBERS[name](ready(Mixed()))
    loader = DataLoader(TRAIN, batch_size=2, shuffle=True)
    found = estimator.score(DataLoader(QUERIES, batch_size=3), loader)
    assert found.train_ids == tuple(range(9))
    torch.testing.assert_close(found.values, estimator.score(QUERIES, TRAIN).values)


@pytest.mark.parametrize("name", MEMBERS)
def test_an_example_without_any_gradient_scores_nothing(name: str) -> None:
    rows = texts(6)
    rows[4] = {**rows[4], "labels": torch.full((6,), -100)}
    for normalise in (False, True):
        estimator = MEMBERS[name](ready(Tokens()), rows, normalise=normalise)
        values = estimator.score(texts(2, seed=5), rows).values
        assert torch.equal(values[:, 4], torch.zeros(2).double())
        assert values.isfinite().all()
        assert (values[:, :4] != 0).all()


@pytest.mark.parametrize("name", MEMBERS)
def test_how_an_example_loss_is_formed_is_written_down(name: str) -> None:
    loss = LanguageModelLoss("mean")
    rows = texts(5)
    estimator = MEMBERS[name](ready(Tokens()), rows, loss=loss)
    assert estimator.score(rows, rows).reduction == "mean"
    assert MEMBERS[name](ready(Mixed())).score(QUERIES, TRAIN).reduction == ClassificationLoss().reduction


@pytest.mark.parametrize("name", MEMBERS)
def test_queries_without_a_target_are_named(name: str) -> None:
    queries = texts(7, seed=5)
    for k in (2, 5):
        queries[k] = {**queries[k], "labels": torch.full((6,), -100)}
    estimator = MEMBERS[name](ready(Tokens()), texts())
    for use in (estimator.check, lambda data: estimator.score(data, texts())):
        with pytest.raises(ValueError, match=r"2 of 7 queries have no supervised target \(ids \[2, 5\]\); expected"):
            use(queries)
    with pytest.raises(ValueError, match=r"1 of 2 queries"):
        check_supervised(estimator.model, ExampleLoader(queries, indices=[5, 1]), None)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_loss_that_is_not_finite_is_named_and_the_model_left_as_it_was(name: str) -> None:
    train, queries = points(9), points(3, seed=3)
    train[7] = (train[7][0] * torch.inf, train[7][1])
    model = mlp().train()
    estimator = MEMBERS[name](model, points(9), batch_size=4)
    with pytest.raises(ValueError, match=r"the loss of 1 of 4 training examples is not finite \(ids \[7\]\)") as caught:
        estimator.score(queries, train)
    assert caught.tb is not None  # holds the frames, as a notebook does after an error
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"1 of 1 queries is not finite \(ids \[7\]\)"):
        estimator.check(ExampleLoader(train, indices=[7]))
    assert estimator.score(queries, points(9)).values.isfinite().all()


@pytest.mark.parametrize("name", MEMBERS)
def test_a_gradient_that_is_not_finite_is_named(name: str) -> None:
    """Though the loss is, for tanh ends at 1."""
    estimator, data = MEMBERS[name](mlp(), points(9)), points(9)
    data[5] = (torch.tensor([0.0, float("inf"), 0.0]).double(), data[5][1])
    for call in ("score", "token_scores") if name == "GradientDot" else ("score",):
        with pytest.raises(ValueError, match=r"the gradient of 1 of 9 training examples is not finite.* \(ids \[5\]\)"):
            getattr(estimator, call)(points(3), data)
        with pytest.raises(ValueError, match=r"the gradient of 1 of 9 queries is not finite.* \(ids \[5\]\)"):
            getattr(estimator, call)(data, points(3))
    if name in ("GradientDot", "InfluenceFunction"):
        with pytest.raises(ValueError, match=r"the gradient of 1 of 9 training examples is not finite"):
            estimator.self_influence(data)


@pytest.mark.parametrize("name", MEMBERS)
def test_arguments(name: str) -> None:
    estimator = MEMBERS[name](ready(Mixed()))
    with pytest.raises(ValueError, match=rf"`{name}.score\(labels='true'\)`: expected 'data' or 'sampled'"):
        estimator.score(QUERIES, TRAIN, labels="true")
    for queries, train in (([], TRAIN), (QUERIES, [])):
        with pytest.raises(ValueError, match="the data is empty; expected at least one example"):
            estimator.score(queries, train)
    with pytest.raises(ValueError, match="'nonsense'"):
        MEMBERS[name](ready(Mixed()), components="nonsense")
    for budget in ("1GB", -1, True, 2e9):
        with pytest.raises(ValueError, match=rf"`{name}\(memory_budget={budget!r}\)`: expected a number of bytes, an"):
            MEMBERS[name](ready(Mixed()), memory_budget=budget)


@pytest.mark.parametrize("name", MEMBERS)
def test_regression_targets_that_look_like_classes(name: str) -> None:
    """The last batch holds the single target 1.0; the first one says that it is a number."""
    data = [*zip(normal(4, 3), normal(4), strict=True), (normal(1, 3)[0], torch.tensor(1.0).double())]
    model = mlp(nn.Linear(3, 1))
    found = MEMBERS[name](model, data, batch_size=4).score(data, data)
    expected = MEMBERS[name](model, data, loss=RegressionLoss()).score(data, data)
    torch.testing.assert_close(found.values, expected.values)


@pytest.mark.parametrize("name", MEMBERS)
def test_linear_regression(name: str) -> None:
    """In closed form: g_i = r_i (x_i, 1) with residual r_i, and the empirical Fisher is E[r² (x, 1)(x, 1)ᵀ]."""
    data = list(zip(normal(20, 3), normal(20, seed=1), strict=True))
    queries = list(zip(normal(5, 3, seed=2), normal(5, seed=3), strict=True))
    model = mlp(nn.Linear(3, 1))

    def gradients(rows: list[Any]) -> Tensor:
        x = torch.stack([torch.cat([x, torch.ones(1).double()]) for x, _ in rows])
        y = torch.stack([y for _, y in rows])
        theta = torch.cat([model[0].weight[0], model[0].bias]).detach()
        return (x @ theta - y)[:, None] * x

    g = gradients(data)
    metric = torch.eye(4).double() if name == "GradientDot" else oracles.damped_inverse(oracles.fisher(g), 0.01)
    curvature = Exact(damping=0.01, fisher="empirical")
    estimator = GradientDot(model) if name == "GradientDot" else InfluenceFunction(model, curvature).fit(data)
    torch.testing.assert_close(estimator.score(queries, data).values, gradients(queries) @ metric @ g.T)


@pytest.mark.parametrize("name", sorted(MEMBERS.keys() - {"CKA"}))
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("memory_budget", [1, 3 * 8 * 111, 10**9])
def test_the_mean_target_has_the_mean_of_the_rows(name: str, normalise: bool, memory_budget: int) -> None:
    estimator = MEMBERS[name](ready(Mixed()), normalise=normalise)
    rows = estimator.score(QUERIES, TRAIN, per_component=True, labels="sampled", seed=2)
    estimator.memory_budget = memory_budget
    options: dict[str, Any] = {"aggregate": "mean", "labels": "sampled", "seed": 2}
    found = estimator.score(QUERIES, TRAIN, per_component=True, **options)
    torch.testing.assert_close(found.values, rows.values.mean(1, keepdim=True))
    assert (found.query_ids, found.train_ids) == (("mean",), rows.train_ids)
    assert found.formula == f"{rows.formula}, mean loss of 4 queries"
    best = estimator.top(QUERIES, TRAIN, 3, **options)
    assert best.query_ids == ("mean",)
    assert [k for k, _ in best.of()] == [k for k, _ in found.top(3)]


def test_means_that_are_not() -> None:
    with pytest.raises(ValueError, match=r"`CKA.score\(aggregate='mean'\)`: scores are not linear in the query's"):
        CKA(ready(Mixed())).score(QUERIES, TRAIN, aggregate="mean")
    with pytest.raises(ValueError, match=r"`GradientDot.top\(aggregate='sum'\)`: expected None or 'mean'"):
        GradientDot(ready(Mixed())).top(QUERIES, TRAIN, 1, aggregate="sum")  # type: ignore[arg-type]


# What is measured of a query


def margin(model: nn.Module, batch: Any) -> Tensor:
    """Nothing like the loss."""
    outputs = model(batch[0])
    return outputs[:, 0] - outputs[:, 1:].tanh().sum(1)


def dense(model: nn.Module, rows: Any, measured: Callable[[nn.Module, Any], Tensor]) -> Tensor:
    """Gradients [n, P] of each row alone."""
    values = [measured(model, (row[0][None], torch.as_tensor(row[1])[None])).sum() for row in rows]
    return torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(v, [*model.parameters()])]) for v in values]
    )


@pytest.mark.parametrize("curved", [False, True])
def test_any_measurement_of_the_queries(curved: bool) -> None:
    model, queries, train = mlp(), points(4, seed=3), points(9)
    gradients = dense(model, train, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))
    inverse = torch.eye(gradients.shape[1], dtype=gradients.dtype)
    if curved:
        inverse = (gradients.T @ gradients / 9 + 0.1 * inverse).inverse()
        curvature = Exact(fisher="empirical", damping=0.1)
        estimator: Estimator = InfluenceFunction(model, curvature, query_loss=margin).fit(train)
    else:
        estimator = GradientDot(model, query_loss=margin)
    found = estimator.score(queries, train)
    torch.testing.assert_close(found.values, dense(model, queries, margin) @ inverse @ gradients.T)
    assert found.reduction == "query: defined by a function, training example: sum"
    assert estimator.top(queries, train, 2).train_ids[0] == tuple(found.values[0].topk(2).indices.tolist())
    with pytest.raises(ValueError, match="no product with itself"):
        estimator.self_influence(train)
    if isinstance(estimator, GradientDot):
        pairs = estimator.pairs(queries, train)
        torch.testing.assert_close(pairs.dots.sum(0).reshape(4, 9), found.values)


def test_a_measurement_without_a_derivative_is_refused() -> None:
    estimator = GradientDot(mlp(), query_loss=lambda model, batch: (model(batch[0]).argmax(1) == batch[1]).double())
    for act in (lambda: estimator.check(points(4)), lambda: estimator.score(points(4), points(9))):
        with pytest.raises(ValueError, match="the losses do not depend on any component: is the loss detached"):
            act()
