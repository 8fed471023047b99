from __future__ import annotations

import pytest
import torch

from lightning_influence.curvature.damping import check_damping, damping_of


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
