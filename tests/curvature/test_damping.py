from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_influence.capture import GradientCapture
from lightning_influence.curvature import CG, CURVATURES, EKFAC, KFAC, Curvature, Diagonal, Exact, LiSSA, ProjectedGram
from lightning_influence.curvature.damping import check_damping, check_invertible, damping_of
from tests.curvature.models import mlp, points


def test_absolute_damping_wins() -> None:
    assert damping_of(torch.tensor([1.0, 3.0]), 0.25, 0.1) == 0.25
    assert damping_of(torch.zeros(2), 0.25, 0.1) == 0.25


def test_a_share_of_the_mean_eigenvalue() -> None:
    assert damping_of(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), None, 0.1) == pytest.approx(0.1)
    assert damping_of(torch.full((3000, 3000), 0.1), None, 0.1) == pytest.approx(0.01, rel=1e-7)


def test_without_any_gradient_there_is_no_scale() -> None:
    assert damping_of(torch.zeros(3), None, 0.1) == 1.0


@pytest.mark.parametrize("damping", [None, 1, 1e-8])
def test_good_damping(damping: float | None) -> None:
    check_damping("EKFAC", damping, 0.1)


@pytest.mark.parametrize("damping", [0, -1.0, float("inf"), True, "1", torch.tensor(1.0)])
def test_bad_damping(damping: object) -> None:
    with pytest.raises(ValueError, match=r"`EKFAC\(damping=.*\)`: expected a number > 0, or None for a share"):
        check_damping("EKFAC", damping, 0.1)


@pytest.mark.parametrize("share", [0, -1.0, float("nan"), None, False])
def test_bad_share(share: object) -> None:
    with pytest.raises(ValueError, match=r"`EKFAC\(damping_share=.*\)`: expected a finite number > 0, for example 0.1"):
        check_damping("EKFAC", None, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lost", [1e-60, 1e-30, 8e-16])
def test_a_damping_that_is_lost_in_rounding_is_refused(lost: float, dtype: torch.dtype) -> None:
    singular = torch.tensor([[0.0, 1.0], [1.0, 2.0]], dtype=dtype)
    with pytest.raises(ValueError, match=rf"`KFAC\(damping={lost}\)`: the curvature of 'a' is singular .* than 8.8"):
        check_invertible("KFAC", "'a'", singular, lost)
    check_invertible("KFAC", "'a'", singular, 9e-16)
    check_invertible("KFAC", "'a'", singular + 1, lost)
    check_invertible("KFAC", "'a'", torch.zeros(2, dtype=dtype), 1e-30)


def test_without_any_gradient_it_must_be_a_number_of_the_dtype() -> None:
    with pytest.raises(ValueError, match="from 0 to 0"):
        check_invertible("KFAC", "'a'", torch.zeros(2), 1e-60)


def test_eigenvalues_that_are_rounding_of_0_are_0() -> None:
    check_invertible("KFAC", "'a'", torch.tensor([1e-8, 1.0], dtype=torch.float64), 1e-30)
    with pytest.raises(ValueError, match="'a' is singular"):
        check_invertible("KFAC", "'a'", torch.tensor([1e-8, 1.0]), 1e-30)


MEMBERS = {
    "Diagonal": Diagonal,
    "EKFAC": EKFAC,
    "Exact": Exact,
    "KFAC": KFAC,
    "ProjectedGram": lambda damping: ProjectedGram((3, 4), damping),
    "ProjectedGram of leading eigenvectors": lambda damping: ProjectedGram((3, 3), damping, initialisation="pca"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MEMBERS)
def test_it_is_refused_before_anything_is_solved(name: str, dtype: torch.dtype) -> None:
    """Gradients of logits add up to 0, so that the layer's factor is singular, and the last input is always 0."""
    model = torch.nn.Linear(4, 3).to(dtype)
    inputs = torch.nn.functional.one_hot(torch.arange(9) % 3, 4).to(dtype)
    data = list(zip(inputs, torch.arange(9) // 3, strict=True))
    curvature = MEMBERS[name](1e-30)
    with pytest.raises(ValueError, match=rf"`{name.split()[0]}\(damping=1e-30\)`: .* this damping is lost in rounding"):
        curvature.fit(model, data)
    assert not curvature.fitted
    sound = MEMBERS[name](1e-6).fit(model, data)
    solved = sound.precondition({"": torch.ones(2, 3, 5, dtype=dtype)})[""]
    assert solved.isfinite().all()


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("name", [*sorted(CURVATURES), "CG", "LiSSA"])
def test_use_changes_nothing(name: str, share: float | None) -> None:
    """Solved, multiplied and whitened with any number of times, it gives the same numbers."""
    kinds: dict[str, type[Curvature]] = {**CURVATURES, "CG": CG, "LiSSA": LiSSA}
    options: dict[str, Any] = (
        {} if name == "Identity" else {"damping": 0.5} if share is None else {"damping_share": share}
    )
    options |= {"Arnoldi": {"rank": 3, "steps": 10}, "LiSSA": {"depth": 20, "tolerance": 0.5}}.get(name, {})
    model, data = mlp(), points()
    curvature = kinds[name](**options).fit(model, data)
    with GradientCapture(model) as capture:
        records = list(zip(capture.components, capture.record(default_collate(data), losses), strict=True))
    gradients = {component.name: record.example_gradients() for component, record in records}
    first = curvature.precondition(gradients)
    for component, record in records:
        curvature.solve(component, gradients[component.name])
        if name in ("Diagonal", "EKFAC", "Exact", "KFAC", "ProjectedGram"):
            curvature.whiten(component, record)
    curvature.multiply(gradients)
    for key, value in curvature.precondition(gradients).items():
        assert torch.equal(value, first[key])


def losses(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
