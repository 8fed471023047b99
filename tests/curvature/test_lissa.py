from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence.capture import find_components
from lightning_influence.curvature import GaussNewtonProduct, HessianProduct, LiSSA
from tests import oracles
from tests.curvature.models import mlp, normal, points

DATA = points(9)
DAMPING = 0.5


def vectors(q: int = 3) -> dict[str, Tensor]:
    return {c.name: normal(q, *c.shape, seed=k) for k, c in enumerate(find_components(mlp()))}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in gradients.values()], dim=1)


def matrix_of(kind: Any) -> Tensor:
    product = kind(mlp(), find_components(mlp()), DATA)
    return product(torch.eye(product.size, dtype=torch.float64))


def test_a_step_is_the_formula() -> None:
    """x ← v + x − (G + λ) x / σ, begun at v, and divided by σ at the end."""
    matrix, v = matrix_of(GaussNewtonProduct) + DAMPING * torch.eye(28), flat(vectors())
    curvature = LiSSA(damping=DAMPING, scale=3.0, depth=4, tolerance=1e-9).fit(mlp(), DATA)
    with pytest.warns(UserWarning, match=r"LiSSA: 0 of 3 queries converged within 4 steps.*Raise depth, damping"):
        found = flat(curvature.precondition(vectors()))
    state = v
    for _ in range(4):
        state = v + state - state @ matrix / 3.0
    torch.testing.assert_close(found, state / 3.0)
    [report] = curvature.history
    residuals = (v - found @ matrix).norm(dim=1) / v.norm(dim=1)
    torch.testing.assert_close(report.residuals[-1], residuals)
    assert report.residuals.shape == (5, 3)
    assert bool((report.residuals.diff(dim=0) < 0).all())
    assert report.steps.tolist() == [4, 4, 4]


def test_the_scale_that_is_found_is_the_largest_eigenvalue() -> None:
    curvature = LiSSA(damping=DAMPING).fit(mlp(), DATA)
    largest = float(torch.linalg.eigvalsh(matrix_of(GaussNewtonProduct))[-1])
    assert curvature.settings()["scale"] is None
    assert largest + DAMPING <= curvature.scale_used <= 1.06 * largest + DAMPING


@pytest.mark.parametrize("share", [0.52, 1.0, 3.0])
def test_any_scale_above_half_of_it_converges(share: float) -> None:
    matrix = matrix_of(GaussNewtonProduct)
    scale = share * float(torch.linalg.eigvalsh(matrix)[-1] + DAMPING)
    curvature = LiSSA(damping=DAMPING, scale=scale, tolerance=1e-9).fit(mlp(), DATA)
    expected = flat(vectors()) @ oracles.damped_inverse(matrix, DAMPING)
    torch.testing.assert_close(flat(curvature.precondition(vectors())), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"examples_per_step": 4, "repeats": 2}])
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_diverging_says_what_scale_to_use(share: float, options: dict[str, Any]) -> None:
    largest = float(torch.linalg.eigvalsh(matrix_of(GaussNewtonProduct))[-1]) + 0.1
    curvature = LiSSA(damping=0.1, scale=share * largest, **options).fit(mlp(), DATA)
    with pytest.raises(
        ValueError, match=r"the recursion diverges. Expected a scale above half of the largest"
    ) as error:
        curvature.precondition(vectors())
    advice = float(str(error.value).split("pass scale=")[1].split(" ")[0])
    assert largest <= advice
    assert advice <= 1.06 * largest or options  # a batch may have a larger one
    again = LiSSA(damping=0.1, scale=advice, tolerance=1e-6).fit(mlp(), DATA)
    again.precondition(vectors())
    assert bool(again.history[0].converged.all())


def test_a_matrix_that_is_not_positive_has_no_scale() -> None:
    lowest = float(torch.linalg.eigvalsh(matrix_of(HessianProduct))[0])
    assert lowest < -0.1
    curvature = LiSSA(damping=0.05, product="hessian").fit(mlp(), DATA)
    with pytest.raises(
        ValueError, match=r"diverges, at any scale: the damped matrix has an eigenvalue of -.*Raise dam"
    ):
        curvature.precondition(vectors())


def test_random_batches_come_near_in_the_mean() -> None:
    matrix = matrix_of(GaussNewtonProduct)
    expected = flat(vectors()) @ oracles.damped_inverse(matrix, DAMPING)
    errors = []
    for repeats in (1, 20):
        options: Any = {"examples_per_step": 3, "repeats": repeats, "depth": 25, "scale": 3.0, "tolerance": 0.5}
        curvature = LiSSA(damping=DAMPING, **options).fit(mlp(), DATA)
        found = flat(curvature.precondition(vectors()))
        errors.append(float((found - expected).norm() / expected.norm()))
        [report] = curvature.history
        rest = flat(vectors()) - found @ (matrix + DAMPING * torch.eye(28))
        torch.testing.assert_close(report.residuals[-1], rest.norm(dim=1) / flat(vectors()).norm(dim=1))
        assert report.steps.tolist() == [25 * repeats] * 3
    assert errors[1] < 0.4 * errors[0]
    assert errors[1] < 0.05


def test_random_batches_depend_on_the_seed_alone() -> None:
    options: Any = {"examples_per_step": 3, "depth": 5, "scale": 3.0, "tolerance": 0.9, "damping": DAMPING}
    one, same, other = (LiSSA(seed=seed, **options).fit(mlp(), DATA) for seed in (0, 0, 1))
    torch.manual_seed(1)
    found = flat(one.precondition(vectors()))
    assert torch.equal(flat(one.precondition(vectors())), found)
    torch.manual_seed(2)
    assert torch.equal(flat(same.precondition(vectors())), found)
    assert not torch.allclose(flat(other.precondition(vectors())), found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, r"scale=0.0\)`: expected a number > 0, or None for the largest eigenvalue"),
        ({"scale": float("nan")}, r"scale=nan\)`: expected a number > 0"),
        ({"depth": 0}, r"depth=0\)`: expected an int >= 1"),
        ({"repeats": 1.5}, r"repeats=1.5\)`: expected an int >= 1"),
        ({"examples_per_step": 0}, r"examples_per_step=0\)`: expected an int >= 1"),
        ({"repeats": 3}, r"repeats=3\)`: without examples_per_step every repetition is the same"),
        ({"tolerance": -1.0}, r"tolerance=-1.0\)`: expected a number in \(0, 1\)"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"`LiSSA\({message}"):
        LiSSA(**options)
