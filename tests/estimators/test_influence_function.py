from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import (
    CG,
    EKFAC,
    KFAC,
    Diagonal,
    Exact,
    GradientDot,
    Identity,
    InfluenceFunction,
    ProjectedGram,
    RegressionLoss,
    omit_nonfinite,
    spearman,
)
from lightning_influence.capture import find_components
from lightning_influence.errors import NotFittedError, StoreError
from lightning_influence.store import Store
from tests import oracles
from tests.curvature.models import Mixed, labels, loss_of, mlp, normal, points, ready, token_rows

TRAIN, QUERIES = points(15), points(4, seed=3)


def flat(model: nn.Module, data: list[Any]) -> Tensor:
    parameters = dict(model.named_parameters())
    rows = oracles.example_gradients(parameters, lambda k: loss_of(model, data[k], k), len(data))
    return torch.cat([value.flatten(1) for value in rows.values()], dim=1)


def test_with_the_exact_fisher_it_is_the_definition() -> None:
    model = mlp()
    found = InfluenceFunction(model, Exact(fisher="empirical")).fit(TRAIN).score(QUERIES, TRAIN)
    inverse = oracles.damped_inverse(oracles.fisher(flat(model, TRAIN)))
    torch.testing.assert_close(found.values, flat(model, QUERIES) @ inverse @ flat(model, TRAIN).T)


def test_unit_gradients_are_scaled_before_the_curvature() -> None:
    model = mlp()
    found = InfluenceFunction(model, Exact(fisher="empirical"), normalise=True).fit(TRAIN).score(QUERIES, TRAIN)
    left, right = flat(model, QUERIES), flat(model, TRAIN)
    inverse = oracles.damped_inverse(oracles.fisher(right))
    left, right = left / left.norm(dim=1, keepdim=True), right / right.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.values, left @ inverse @ right.T)


def test_without_curvature_it_is_the_dot_product() -> None:
    model = ready(Mixed())
    found = InfluenceFunction(model, Identity()).score(token_rows(4), token_rows(9, seed=2))
    torch.testing.assert_close(found.values, GradientDot(model).score(token_rows(4), token_rows(9, seed=2)).values)


def test_large_damping_is_the_dot_product() -> None:
    found = InfluenceFunction(mlp(), EKFAC(damping=1e9)).fit(TRAIN).score(QUERIES, TRAIN)
    torch.testing.assert_close(1e9 * found.values, GradientDot(mlp()).score(QUERIES, TRAIN).values)


def test_leaving_an_example_out_of_a_linear_regression() -> None:
    """With the Gauss-Newton matrix of squared error, I/n is what the query's loss gains by it, to first order."""
    x, y = normal(200, 3), normal(200, 1, seed=1)
    model = mlp(nn.Linear(3, 1, bias=False))
    decay = 1e-3

    def minimiser(kept: Tensor) -> Tensor:
        return torch.linalg.solve(x[kept].T @ x[kept] / 200 + decay * torch.eye(3), x[kept].T @ y[kept] / 200)[:, 0]

    with torch.no_grad():
        model[0].weight.copy_(minimiser(torch.arange(200)))
    # 100 draws of each label bring the sampled Fisher close to its expectation E[x xᵀ].
    repeated = [(x[k % 200], y[k % 200]) for k in range(20_000)]
    curvature = Exact(damping=decay).fit(model, repeated, RegressionLoss(), batch_size=4000)
    query = (normal(3, seed=8), torch.tensor([2.0]).double())  # far off: the first order decides
    found = InfluenceFunction(model, curvature, RegressionLoss()).score([query], list(zip(x, y, strict=True)))
    loss = lambda w: 0.5 * (w @ query[0] - query[1][0]) ** 2  # noqa: E731
    whole = loss(minimiser(torch.arange(200)))
    changes = torch.stack([loss(minimiser(torch.arange(200) != k)) - whole for k in range(200)])
    assert torch.corrcoef(torch.stack([changes, found.values[0] / 200]))[0, 1] > 0.999
    torch.testing.assert_close(found.values[0] / 200, changes, rtol=0.1, atol=float(changes.abs().max()) * 0.05)


@pytest.mark.parametrize(
    ("curvature", "damping"),
    [
        (EKFAC(), "0.1 x mean eigenvalue"),
        (KFAC(damping_share=0.5), "0.5 x mean eigenvalue"),
        (Exact(damping=1e-3), "0.001"),
        (Identity(), None),
    ],
)
def test_scores_say_what_they_are(curvature: Any, damping: str | None) -> None:
    scores = InfluenceFunction(mlp(), curvature).fit(TRAIN).score(QUERIES, TRAIN)
    assert scores.damping == damping
    assert scores.formula == f"g_q^T (G + damping)^-1 g_i, G: {type(curvature).__name__}"


def test_the_curvature_is_fitted_once() -> None:
    influence = InfluenceFunction(mlp(), EKFAC(damping=0.1)).fit(TRAIN)
    before = influence.score(QUERIES, TRAIN).values
    assert torch.equal(influence.fit(points(3, seed=9)).score(QUERIES, TRAIN).values, before)
    assert isinstance(InfluenceFunction(mlp()).curvature, EKFAC)


def test_before_fitting() -> None:
    with pytest.raises(NotFittedError, match=r"`InfluenceFunction.score`: EKFAC is not fitted. Call fit\(train\)"):
        InfluenceFunction(mlp()).score(QUERIES, TRAIN)


def test_components_of_a_fitted_curvature_are_taken_over() -> None:
    model = mlp()
    curvature = EKFAC().fit(model, TRAIN, components=["2"])
    influence = InfluenceFunction(model, curvature)
    assert [c.name for c in influence.components] == ["2"]
    expected = InfluenceFunction(model, components=["2"]).fit(TRAIN).score(QUERIES, TRAIN)
    torch.testing.assert_close(influence.score(QUERIES, TRAIN).values, expected.values)
    with pytest.raises(ValueError, match=r"EKFAC was fitted on 1 components, and only one of the two sides has \['0'"):
        InfluenceFunction(model, curvature, components="all-linear")


def test_an_identity_goes_with_any_model() -> None:
    identity = Identity()
    assert InfluenceFunction(mlp(), identity, components=["2"]).score(QUERIES, TRAIN).values.isfinite().all()
    found = InfluenceFunction(mlp(), identity)
    assert len(found.components) == 2
    assert found.score(QUERIES, TRAIN).values.isfinite().all()


@pytest.mark.parametrize("components", [None, ["up", "norm"]])
def test_from_a_store(components: Any, tmp_path: Any) -> None:
    """In a process that knows the model and the folder only; names such as "0" are no expressions there."""
    model, data = ready(Mixed()), token_rows()
    influence = InfluenceFunction(model, EKFAC(seed=3), components=components, normalise=True).fit(data)
    store = Store.create(tmp_path, model, find_components(model))
    store.write_curvature("curvature", influence.curvature)
    for place in (store, str(tmp_path)):
        found = InfluenceFunction.from_store(model, place, normalise=True)
        assert found.components == influence.components
        assert torch.equal(found.score(data, data).values, influence.score(data, data).values)


def test_from_the_store_of_another_model(tmp_path: Any) -> None:
    model = mlp()
    store = Store.create(tmp_path, model, find_components(model))
    store.write_curvature("curvature", EKFAC().fit(model, TRAIN))
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(StoreError, match="the store belongs to other weights"):
        InfluenceFunction.from_store(model, store)
    with pytest.raises(StoreError, match="has no curvature 'last'"):
        InfluenceFunction.from_store(mlp(), store, "last")


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    "curvature",
    [EKFAC(), KFAC(damping=0.02), Diagonal(), ProjectedGram((2, 2), projection_seed=4), Exact(), Identity()],
    ids=repr,
)
def test_inner_products_of_features_are_influences(curvature: Any, normalise: bool) -> None:
    """Blocks of every structure; scores have oracles of their own."""
    model, data, queries = ready(Mixed()), token_rows(9), token_rows(4, seed=2)
    influence = InfluenceFunction(model, curvature, normalise=normalise).fit(data)
    rows, goals = influence.features(data), influence.features(queries, supervised=True)
    assert rows.shape == (9, sum(curvature.whitened_size(c) for c in influence.components))
    torch.testing.assert_close(goals @ rows.T, influence.score(queries, data).values)
    torch.testing.assert_close(rows.square().sum(1), influence.self_influence(data).values[0])
    for size in (1, 4):
        batched = InfluenceFunction(model, curvature, normalise=normalise, batch_size=size)
        torch.testing.assert_close(batched.features(data), rows)


@pytest.mark.parametrize("normalise", [False, True])
def test_features_are_the_definition(normalise: bool) -> None:
    model = mlp()
    influence = InfluenceFunction(model, Exact(damping=0.01, fisher="empirical"), normalise=normalise).fit(TRAIN)
    found, gradients = influence.features(TRAIN), flat(model, TRAIN)
    inverse = oracles.damped_inverse(oracles.fisher(gradients), 0.01)
    if normalise:
        gradients = gradients / gradients.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found @ found.T, gradients @ inverse @ gradients.T)


def test_features_under_sampled_labels() -> None:
    influence = InfluenceFunction(mlp(), EKFAC()).fit(TRAIN)
    sampled = influence.features(QUERIES, labels="sampled", seed=3)
    expected = influence.score(QUERIES, TRAIN, labels="sampled", seed=3).values
    torch.testing.assert_close(sampled @ influence.features(TRAIN).T, expected)


def test_features_that_cannot_be() -> None:
    with pytest.raises(NotFittedError, match=r"`InfluenceFunction.features`: EKFAC is not fitted. Call fit\(train\)"):
        InfluenceFunction(mlp()).features(TRAIN)
    small = InfluenceFunction(mlp(), Identity(), memory_budget=100)
    with pytest.raises(ValueError, match=r"15 examples take 0.0 GB; expected at most memory_budget=100 bytes. Write"):
        small.features(TRAIN)
    iterative = InfluenceFunction(mlp(), CG()).fit(TRAIN)
    with pytest.raises(ValueError, match=r"`CG.whiten`: a curvature that is known by its products alone has no square"):
        iterative.features(TRAIN)


def test_examples_without_a_finite_loss_are_left_out_on_request_alone() -> None:
    model, broken = mlp(), [(x * torch.nan, y) if k == 4 else (x, y) for k, (x, y) in enumerate(TRAIN)]
    with pytest.raises(ValueError, match=r"not finite \(ids \[4\]\).* leave these examples out: omit_nonfinite\(model"):
        InfluenceFunction(model).fit(broken)
    with pytest.warns(UserWarning, match=r"1 of 15 examples are left out .*\(ids \[4\]\)"):
        found = InfluenceFunction(model, EKFAC(fisher="empirical")).fit(broken, nan_policy="omit")
    assert found.curvature.omitted == (4,)
    kept = [row for k, row in enumerate(TRAIN) if k != 4]
    expected = InfluenceFunction(model, EKFAC(fisher="empirical")).fit(kept).score(QUERIES, kept).values
    with pytest.warns(UserWarning, match="1 of 15"):
        left = omit_nonfinite(model, broken)
    torch.testing.assert_close(found.score(QUERIES, left).values, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"`InfluenceFunction.fit\(nan_policy='skip'\)`: expected 'raise'"):
        found.fit(TRAIN, nan_policy="skip")  # type: ignore[arg-type]


def test_factors_in_bfloat16_rank_as_those_in_float32(tmp_path: Any) -> None:
    """3 digits of every factor are enough to tell examples apart, query by query."""
    model = mlp(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).float()
    train, queries = ([(x.float(), y) for x, y in wide(n, seed)] for n, seed in ((200, 0), (8, 1)))
    expected = InfluenceFunction(model, EKFAC()).fit(train)
    store = Store.create(tmp_path, model, expected.components)
    store.write_curvature("curvature", expected.curvature, dtype="bfloat16")
    found = InfluenceFunction.from_store(model, tmp_path).score(queries, train).values
    whole = expected.score(queries, train).values
    assert found.dtype == whole.dtype == torch.float32
    assert not torch.equal(found, whole)
    assert float(spearman(found, whole).min()) > 0.999


def wide(n: int, seed: int) -> list[Any]:
    return list(zip(normal(n, 6, seed=seed), labels(n, 4, seed), strict=True))


def test_a_transform_of_a_subclass_is_the_one_that_scores() -> None:
    class Doubled(InfluenceFunction):
        def transform(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: 2 * value for name, value in super().transform(gradients).items()}

    model, curvature = ready(Mixed()), EKFAC()
    plain = InfluenceFunction(model, curvature).fit(token_rows())
    doubled = Doubled(model, curvature).score(token_rows(3), token_rows())
    torch.testing.assert_close(doubled.values, 2 * plain.score(token_rows(3), token_rows()).values)


@pytest.mark.parametrize("t", [2, 60])
def test_a_curvature_in_float64_for_a_model_in_float32(t: int) -> None:
    wide, narrow = ready(Mixed()), ready(Mixed()).float()
    rows = token_rows(6, t)
    curvature = EKFAC().fit(wide, rows)
    expected = InfluenceFunction(wide, curvature).score(rows, rows).values
    found = InfluenceFunction(narrow, curvature).score(rows, rows).values
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


class Counted(list[Any]):
    """Rows that count how often they are read."""

    reads = 0

    def __getitem__(self, k: Any) -> Any:
        self.reads += 1
        return super().__getitem__(k)


@pytest.mark.parametrize("budgets", [{"memory_budget": 10**8}, {"disk_budget": 10**6}])
def test_what_is_kept_of_the_first_pass_needs_no_second(budgets: dict[str, Any], tmp_path: Any) -> None:
    model, plain, kept = mlp(), Counted(TRAIN), Counted(TRAIN)
    expected = InfluenceFunction(model, EKFAC()).fit(plain).score(QUERIES, TRAIN).values
    found = InfluenceFunction(model, EKFAC()).fit(kept, scratch=tmp_path, **budgets).score(QUERIES, TRAIN).values
    torch.testing.assert_close(found, expected)
    assert plain.reads - kept.reads == len(TRAIN)
    with pytest.raises(ValueError, match=r"`fit\(memory_budget='1GB'\)`: expected a number of bytes"):
        InfluenceFunction(model, EKFAC()).fit(TRAIN, memory_budget="1GB")  # type: ignore[arg-type]


def test_a_curvature_of_other_weights_warns() -> None:
    """Whichever of the two has moved; gradients at one place and curvature at another may be meant."""
    curvature, other = EKFAC().fit(mlp(), TRAIN), mlp()
    with torch.no_grad():
        other[0].weight += 0.1
    message = r"EKFAC was fitted on other weights than the model has now \(1 parameters differ, such as \['0.weight'\]"
    influence = InfluenceFunction(other, curvature)
    for call in (
        lambda: influence.score(QUERIES, TRAIN),
        lambda: influence.self_influence(TRAIN),
        lambda: influence.features(TRAIN),
        lambda: influence.fit(TRAIN),
    ):
        with pytest.warns(UserWarning, match=message):
            call()
    narrow = [(x.float(), y) for x, y in TRAIN]
    InfluenceFunction(mlp().float(), curvature).score(narrow[:3], narrow)
