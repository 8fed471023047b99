from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import InfluenceFunction
from lightning_influence.capture import find_components
from lightning_influence.curvature import CG, EKFAC, KFAC, Diagonal, GaussNewtonProduct, Identity, LiSSA
from tests import oracles
from tests.curvature.models import mlp, normal, points


def steep(n: int = 120) -> tuple[nn.Module, list[Any]]:
    """A problem with a spectrum over many orders: inputs on unlike scales, labels from the model."""
    model = mlp(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 5))
    x = normal(n, 10) * torch.logspace(0.5, -1, 10).double()
    with torch.no_grad():
        places = normal(n, seed=3).sigmoid()
        labels = (model(x).softmax(1).cumsum(1) < places[:, None]).sum(1).clamp_max(4)
    return model, list(zip(x, labels, strict=True))


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])
def test_a_preconditioner_saves_steps(tolerance: float) -> None:
    model, data = steep()
    damping = 1e-4
    steps, scores = [], []
    for preconditioner in (None, EKFAC(damping=damping)):
        curvature = CG(damping=damping, preconditioner=preconditioner, tolerance=tolerance, max_steps=500)
        influence = InfluenceFunction(model, curvature, batch_size=120).fit(data)
        scores.append(influence.score(data[:2], data).values)
        [report] = curvature.history
        assert bool(report.converged.all())
        steps.append(report.steps)
    assert bool((4 * steps[1] < 3 * steps[0]).all())  # 0.5 to 0.61, as processors round
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=20 * tolerance * float(scores[0].abs().max()))


@pytest.mark.parametrize("preconditioner", [KFAC, EKFAC, Diagonal, Identity])
def test_any_preconditioner_gives_the_same_solution(preconditioner: Any) -> None:
    model, data = mlp(), points(9)
    found = CG(damping=0.1, preconditioner=preconditioner(), tolerance=1e-11).fit(model, data)
    product = GaussNewtonProduct(model, found.components, data)
    inverse = oracles.damped_inverse(product(torch.eye(product.size, dtype=torch.float64)), 0.1)
    torch.testing.assert_close(flat(found.precondition(vectors())), flat(vectors()) @ inverse, rtol=1e-8, atol=1e-8)


def vectors(q: int = 3) -> dict[str, Tensor]:
    return {c.name: normal(q, *c.shape, seed=k) for k, c in enumerate(find_components(mlp()))}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in gradients.values()], dim=1)


def test_a_preconditioner_that_is_fitted_is_used_as_it_is() -> None:
    model, data = mlp(), points(9)
    fitted = EKFAC(damping=0.1).fit(model, points(5, seed=4))
    state = {key: value.clone() for key, value in fitted.state().items()}
    curvature = CG(preconditioner=fitted).fit(model, data)
    assert curvature.settings()["preconditioner"] is fitted
    assert all(torch.equal(value, state[key]) for key, value in fitted.state().items())
    with pytest.raises(ValueError, match=r"EKFAC was fitted on other components; only one of the two has \['0'\]"):
        CG(preconditioner=EKFAC().fit(model, data, components=["2"])).fit(model, data)


def test_one_that_is_not_is_fitted_on_the_same_data_every_time() -> None:
    model = mlp()
    curvature = CG(preconditioner=EKFAC(damping=0.1))
    for seed in (1, 2):
        data = points(7, seed=seed)
        curvature.fit(model, data)
        expected = EKFAC(damping=0.1).fit(model, data).state()
        assert curvature.preconditioner is not None
        found = curvature.preconditioner.state()
        for key, value in expected.items():
            if "basis" not in key:
                torch.testing.assert_close(found[key], value)
    assert repr(curvature.settings()["preconditioner"]) == repr(EKFAC(damping=0.1))
    assert not curvature.settings()["preconditioner"].fitted


def test_what_was_not_reached_is_told() -> None:
    model, data = steep(40)
    curvature = CG(damping=1e-4, tolerance=1e-6, max_steps=3).fit(model, data)
    gradients = {c.name: normal(2, *c.shape) for c in curvature.components}
    with pytest.warns(UserWarning, match=r"CG: 0 of 2 queries converged within 3 steps, largest .*rows \[0, 1\] are"):
        found = curvature.precondition(gradients)
    [report] = curvature.history
    assert report.residuals.shape == (4, 2)
    assert report.residuals[0].tolist() == [1.0, 1.0]
    assert report.steps.tolist() == [3, 3]
    product = GaussNewtonProduct(model, curvature.components, data)
    rest = flat(gradients) - product(flat(found)) - 1e-4 * flat(found)
    torch.testing.assert_close(report.residuals[-1], rest.norm(dim=1) / flat(gradients).norm(dim=1))


def test_queries_stop_one_by_one() -> None:
    model, data = mlp(), points(9)
    curvature = CG(damping=0.1, tolerance=1e-8).fit(model, data)
    product = GaussNewtonProduct(model, curvature.components, data)
    matrix = product(torch.eye(product.size, dtype=torch.float64))
    rows = torch.cat([torch.linalg.eigh(matrix)[1].T[-1:], normal(1, product.size)])
    parts = torch.split(rows, [c.numel for c in curvature.components], dim=1)
    gradients = {c.name: p.reshape(-1, *c.shape) for c, p in zip(curvature.components, parts, strict=True)}
    found = flat(curvature.precondition(gradients))
    torch.testing.assert_close(found, rows @ oracles.damped_inverse(matrix, 0.1), rtol=1e-6, atol=1e-6)
    assert curvature.history[0].steps[0] == 1  # an eigenvector
    assert curvature.history[0].steps[1] > 5


def test_a_negative_direction_is_refused() -> None:
    curvature = CG(damping=0.01, product="hessian").fit(mlp(), points(9))
    with pytest.raises(ValueError, match=r"a direction of curvature -.* damping of 0.01 included.*'gauss-newton'"):
        curvature.precondition(vectors(40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preconditioner": "EKFAC"}, r"preconditioner='EKFAC'\)`: expected a Curvature, such as EKFAC\(\)"),
        ({"preconditioner": LiSSA()}, r"preconditioner=LiSSA\(.*\)`: a solver that stops at a tolerance is not"),
        ({"tolerance": 1.0}, r"tolerance=1.0\)`: expected a number in \(0, 1\)"),
        ({"max_steps": 0}, r"max_steps=0\)`: expected an int >= 1"),
        ({"max_steps": 2.0}, r"max_steps=2.0\)`: expected an int >= 1"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"`CG\({message}"):
        CG(**options)
