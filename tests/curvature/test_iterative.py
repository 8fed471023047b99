"""The laws of solvers that go back to the model, for every member, and what they share."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import InfluenceFunction, RegressionLoss
from lightning_influence.capture import ExampleLoader, GradientCapture, find_components
from lightning_influence.curvature import (
    CG,
    EKFAC,
    Convergence,
    Exact,
    GaussNewtonProduct,
    HessianProduct,
    IterativeCurvature,
    LiSSA,
)
from lightning_influence.errors import NotFittedError, StoreError
from lightning_influence.store import Store
from tests import oracles
from tests.curvature import oracles_second_order as truths
from tests.curvature.models import batch_of, loss_of, mlp, normal, points

DATA = points(9)
SOLVERS: dict[str, Any] = {
    "CG": lambda **o: CG(**{"tolerance": 1e-12, "damping": 0.3, **o}),
    "CG with EKFAC": lambda **o: CG(**{"tolerance": 1e-12, "damping": 0.3, "preconditioner": EKFAC(), **o}),
    "CG with Exact": lambda **o: CG(**{"tolerance": 1e-12, "damping": 0.3, "preconditioner": Exact(), **o}),
    "LiSSA": lambda **o: LiSSA(**{"tolerance": 1e-11, "damping": 2.0, "depth": 3000, **o}),
}
NAMES = list(SOLVERS)


def vectors(q: int = 3, seed: int = 5) -> dict[str, Tensor]:
    return {c.name: normal(q, *c.shape, seed=seed + k) for k, c in enumerate(find_components(mlp()))}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten(1) for name in sorted(gradients)], dim=1)


def solved(curvature: Any, gradients: dict[str, Tensor] | None = None) -> Tensor:
    """All blocks apart, then all together."""
    gradients = vectors() if gradients is None else gradients
    apart = {c.name: curvature.solve(c, gradients[c.name]) for c in curvature.components}
    return torch.cat([flat(apart), flat(curvature.precondition(gradients))])


def matrix_of(kind: Any, data: Any = DATA, model: nn.Module | None = None) -> Tensor:
    product = kind(model or mlp(), find_components(mlp()), data)
    return product(torch.eye(product.size, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("product", "kind", "damping"), [("gauss-newton", GaussNewtonProduct, 0.1), ("hessian", HessianProduct, 0.8)]
)
def test_it_converges_to_the_dense_solution(name: str, product: Any, kind: Any, damping: float) -> None:
    curvature = SOLVERS[name](damping=damping, product=product).fit(mlp(), DATA)
    matrix = matrix_of(kind)
    first = curvature.components[0].numel
    inverse = oracles.damped_inverse(matrix, damping)
    apart = torch.block_diag(
        oracles.damped_inverse(matrix[:first, :first], damping), oracles.damped_inverse(matrix[first:, first:], damping)
    )
    expected = torch.cat([flat(vectors()) @ apart, flat(vectors()) @ inverse])
    torch.testing.assert_close(solved(curvature), expected, rtol=1e-8, atol=1e-9)
    assert all(bool(report.converged.all()) for report in curvature.history)
    assert len(curvature.history) == 3  # two blocks, and all of them


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_exact_fisher_where_that_is_the_gauss_newton_matrix(name: str) -> None:
    """Squared error with every direction of the error in the data for every input: no label is left to chance."""
    model, errors = mlp(), 3**0.5 * torch.cat([torch.eye(3), -torch.eye(3)]).double()
    with torch.no_grad():
        data = [(x, model(x) - error) for x in normal(4, 3) for error in errors]
    options: Any = {"damping": None, "damping_share": 5.0, "fisher": "empirical"}
    exact = Exact(**options).fit(model, data, RegressionLoss())
    curvature = SOLVERS[name](**options).fit(model, data, RegressionLoss())
    torch.testing.assert_close(solved(curvature), solved(exact), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_using_it_changes_nothing(name: str) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    curvature = SOLVERS[name](damping=None, damping_share=5.0).fit(model, DATA)
    gradients = vectors()
    copies = {key: value.clone() for key, value in gradients.items()}
    first = solved(curvature, gradients)
    assert torch.equal(solved(curvature, gradients), first)
    assert all(torch.equal(gradients[key], copies[key]) for key in copies)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert curvature.settings()["damping"] is None


@pytest.mark.parametrize("name", NAMES)
def test_batches_order_shards_and_seeds_do_not_matter(name: str) -> None:
    model, expected = mlp(), solved(SOLVERS[name]().fit(mlp(), DATA))
    order = torch.randperm(len(DATA), generator=torch.Generator().manual_seed(3)).tolist()
    for data, batch_size in ((DATA, 4), (ExampleLoader(DATA, 5, indices=order), None)):
        found = SOLVERS[name]().fit(model, data, batch_size=batch_size)
        torch.testing.assert_close(solved(found), expected, rtol=1e-8, atol=1e-10)
    parts = [SOLVERS[name]() for _ in range(2)]
    with GradientCapture(model) as capture:
        for part, rows in zip(parts, (range(4), range(4, 9)), strict=True):
            part.start(capture.components)
            for ids, batch in ExampleLoader(DATA, 4, indices=rows):
                part.observe(capture, ids, batch)
    parts[0].merge(parts[1:])
    parts[0].finish_pass()
    assert not parts[0].fitted
    torch.testing.assert_close(solved(parts[0].bind(model, DATA)), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(solved(SOLVERS[name](seed=4).fit(model, DATA)), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_solving_is_linear_symmetric_and_positive(name: str) -> None:
    curvature, one, other = SOLVERS[name]().fit(mlp(), DATA), vectors(seed=1), vectors(seed=40)
    mixed = {key: 2.0 * one[key] - 0.5 * other[key] for key in one}
    torch.testing.assert_close(solved(curvature, mixed), 2 * solved(curvature, one) - 0.5 * solved(curvature, other))
    for rows in (slice(0, 3), slice(3, 6)):
        left, right = solved(curvature, one)[rows], solved(curvature, other)[rows]
        torch.testing.assert_close(flat(one) @ right.T, left @ flat(other).T)
        assert ((flat(one) * left).sum(1) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_large_damping_only_scales(name: str) -> None:
    found = solved(SOLVERS[name](damping=1e12).fit(mlp(), DATA))
    torch.testing.assert_close(1e12 * found, torch.cat([flat(vectors())] * 2))


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_know_each_other_and_zero_stays_zero(name: str) -> None:
    curvature, gradients = SOLVERS[name]().fit(mlp(), DATA), vectors()
    for part in gradients.values():
        part[1] = 0
        part[2] *= 1e6
    whole = solved(curvature, gradients)
    assert not whole[1].any()
    single = [solved(curvature, {key: value[k : k + 1] for key, value in gradients.items()}) for k in range(3)]
    expected = torch.cat([row[:1] for row in single] + [row[1:] for row in single])
    torch.testing.assert_close(whole, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_a_share_of_the_mean_eigenvalue_is_that_of_the_fisher(name: str) -> None:
    """Of all components together, as in Exact, with the same labels."""
    damping = 5.0 * float(Exact(seed=2).fit(mlp(), DATA).eigenvalues.mean())
    found = SOLVERS[name](damping=None, damping_share=5.0, seed=2).fit(mlp(), DATA)
    expected = SOLVERS[name](damping=damping).fit(mlp(), DATA)
    torch.testing.assert_close(solved(found), solved(expected))


@pytest.mark.parametrize("name", NAMES)
def test_settings_build_an_unfitted_twin(name: str) -> None:
    curvature = SOLVERS[name]().fit(mlp(), DATA)
    twin = type(curvature)(**curvature.settings())
    assert repr(twin) == repr(curvature)
    assert not twin.fitted
    torch.testing.assert_close(solved(twin.fit(mlp(), DATA)), solved(curvature))
    again = solved(curvature.fit(mlp(), points(9, seed=3)))
    torch.testing.assert_close(again, solved(SOLVERS[name]().fit(mlp(), points(9, seed=3))))
    assert len(curvature.history) == 3


@pytest.mark.parametrize("name", NAMES)
def test_influence(name: str) -> None:
    model, queries = mlp(), points(3, seed=7)
    found = InfluenceFunction(model, SOLVERS[name](damping=0.1)).fit(DATA).score(queries, DATA)
    inverse = oracles.damped_inverse(_dense_by_parameter(model), 0.1)
    torch.testing.assert_close(found.values, _rows(model, queries) @ inverse @ _rows(model, DATA).T)
    assert found.damping == "0.1"
    assert found.formula == f"g_q^T (G + damping)^-1 g_i, G: {name.split()[0]}"


def _rows(model: nn.Module, data: list[Any]) -> Tensor:
    parameters = dict(model.named_parameters())
    found = oracles.example_gradients(parameters, lambda k: loss_of(model, data[k], k), len(data))
    return torch.cat([value.flatten(1) for value in found.values()], dim=1)


def _dense_by_parameter(model: nn.Module) -> Tensor:
    outputs = [lambda row=row: model(batch_of(row)[0])[0] for row in DATA]
    return truths.gauss_newton(list(model.parameters()), outputs, truths.softmax_curve)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused(name: str) -> None:
    owner = name.split()[0]
    for options, message in (
        ({"damping": 0}, r"damping=0\)`: expected a number > 0"),
        ({"damping": -1e-3}, r"damping=-0.001\)`: expected a number > 0"),
        ({"damping_share": 0}, r"damping_share=0\)`: expected a finite number > 0"),
        ({"fisher": "true"}, r"fisher='true'\)`: expected 'sampled'"),
        ({"seed": 0.5}, r"seed=0.5\)`: expected an int"),
        ({"product": "fisher"}, r"product='fisher'\)`: expected one of \['gauss-newton', 'hessian'\]"),
        ({"tolerance": 0}, r"tolerance=0\)`: expected a number in \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=rf"`{owner}\({message}"):
            SOLVERS[name](**options)
    data = points(9)
    data[7] = (data[7][0] * torch.nan, data[7][1])
    with pytest.raises(ValueError, match=r"the loss of 1 of 4 training examples is not finite \(ids \[7\]\)"):
        SOLVERS[name]().fit(mlp(), data, batch_size=4)
    data[7] = (data[6][0] * 1e200, data[6][1])
    with pytest.raises(ValueError, match=r"the gradient of 1 of 4 examples by '0' is not finite.* \(ids \[7\]\)"):
        SOLVERS[name]().fit(mlp(), data, batch_size=4)
    with pytest.raises(ValueError, match="the data is empty; expected at least one example"):
        SOLVERS[name]().fit(mlp(), [])


@pytest.mark.parametrize("name", NAMES)
def test_before_and_between(name: str) -> None:
    curvature, owner, components = SOLVERS[name](), name.split()[0], find_components(mlp())
    for use in (lambda: solved_one(curvature, components), lambda: curvature.precondition(vectors()), curvature.state):
        with pytest.raises(NotFittedError, match=rf"{owner} has not seen its data yet: call fit\(model, data\)"):
            use()
    curvature.start(components)
    with pytest.raises(NotFittedError, match=rf"`{owner}.bind`: finish the pass over the data first, or call fit"):
        curvature.bind(mlp(), DATA)
    with pytest.raises(ValueError, match=rf"`{owner}.finish_pass\(\)`: no gradient was seen; expected at least one"):
        curvature.finish_pass()


def solved_one(curvature: IterativeCurvature, components: Any) -> Tensor:
    return curvature.solve(components[0], vectors()[components[0].name])


@pytest.mark.parametrize("name", NAMES)
def test_there_is_nothing_to_store(name: str, tmp_path: Any) -> None:
    model, owner = mlp(), name.split()[0]
    curvature = SOLVERS[name]().fit(model, DATA)
    message = rf"{owner} keeps no factors: .* such as EKFAC\(\)"
    with pytest.raises(StoreError, match=message):
        curvature.state()
    with pytest.raises(StoreError, match=message):
        curvature.load_state(find_components(model), {})
    store = Store.create(tmp_path, model, find_components(model))
    with pytest.raises(ValueError, match=rf"{owner} could not be read back"):
        store.write_curvature("c", curvature)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_changed_since_are_refused(name: str) -> None:
    model = mlp()
    curvature = SOLVERS[name]().fit(model, DATA)
    with torch.no_grad():
        model[2].weight[0, 0] += 0.01
    with pytest.raises(ValueError, match=r"2.weight has changed since the curvature was fitted.* Fit the curvature ag"):
        curvature.precondition(vectors())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CG with Exact"])
def test_float32(name: str) -> None:
    model, data = mlp().float(), [(x.float(), y) for x, y in DATA]
    gradients = {key: value.float() for key, value in vectors().items()}
    found = SOLVERS[name](tolerance=1e-5).fit(model, data).precondition(gradients)
    assert {part.dtype for part in found.values()} == {torch.float32}
    expected = SOLVERS[name]().fit(mlp(), DATA).precondition(vectors())
    torch.testing.assert_close(flat(found).double(), flat(expected), rtol=1e-3, atol=1e-4)


def test_a_report_in_words() -> None:
    residuals = torch.tensor([[1.0, 1.0], [0.5, 0.001], [0.2, 0.001]], dtype=torch.float64)
    report = Convergence(residuals, torch.tensor([2, 1]), 0.01)
    assert report.converged.tolist() == [False, True]
    assert str(report) == "1 of 2 queries converged within 2 steps, largest residual 0.2 (tolerance 0.01)"


@pytest.mark.parametrize("kind", [GaussNewtonProduct, HessianProduct])
def test_multiplying_is_the_product_without_damping(kind: Any) -> None:
    curvature = SOLVERS["CG"](product=kind.kind).fit(mlp(), DATA)
    given = vectors()
    found = curvature.multiply(given)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in given.items()}
    torch.testing.assert_close(flat(found), flat(given) @ matrix_of(kind))
