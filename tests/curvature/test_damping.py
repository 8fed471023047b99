from __future__ import annotations

import pytest
import torch

from lightning_influence.curvature import EKFAC
from lightning_influence.curvature.damping import check_damping, check_invertible, damping_of


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


def test_a_damping_that_is_lost_in_rounding_is_refused() -> None:
    """1e-60 is a float of Python, and 0 in float32."""
    singular = torch.tensor([0.0, 2.0])
    with pytest.raises(
        ValueError, match=r"`KFAC\(damping=1e-60\)`: the curvature of 'a' is singular, and in torch.float"
    ):
        check_invertible("KFAC", "a", singular, 1e-60)
    check_invertible("KFAC", "a", singular.double(), 1e-60)
    check_invertible("KFAC", "a", singular + 1, 1e-60)


def test_it_is_refused_before_anything_is_solved() -> None:
    """Gradients of logits add up to 0, so that the last layer's factor is singular."""
    model = torch.nn.Linear(3, 3)
    data = [(torch.eye(3)[k % 3], torch.tensor(k // 3)) for k in range(9)]
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    curvature = EKFAC(damping=1e-60, fisher="empirical")
    with pytest.raises(ValueError, match=r"`EKFAC\(damping=1e-60\)`: .* Expected a damping that is not lost"):
        curvature.fit(model, data)
    assert not curvature.fitted
