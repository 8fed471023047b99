from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.estimators.newton_step import (
    IndefiniteError,
    curvature_term,
    curvature_vectors,
    newton_shift,
)
from tests.curvature.models import normal


def pieces(k: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient sum [r], rows [k, r] and H [r, r] larger than a third of their outer products."""
    rows = normal(k, r, seed=seed)
    return normal(r, seed=seed + 1), rows, torch.eye(r).double() + rows.T @ rows / 3


@given(k=st.integers(1, 9), r=st.integers(1, 6), seed=st.integers(0, 1000), sign=st.sampled_from([1.0, -1.0]))
def test_woodbury_is_the_inverse(k: int, r: int, seed: int, sign: float) -> None:
    """With fewer rows than coordinates and with more."""
    total, rows, hessian = pieces(k, r, seed)
    inverse, weight = torch.linalg.inv(hessian), 0.3
    found = newton_shift(weight * inverse @ total, rows, rows @ inverse, weight, sign)
    expected = weight * torch.linalg.solve(hessian - sign * weight * rows.T @ rows, total)
    torch.testing.assert_close(found, expected)


def test_the_second_order_is_the_products_written_out() -> None:
    total, rows, hessian = pieces(3, 4)
    inverse = torch.linalg.inv(hessian)
    gradient = normal(4, seed=9)
    found = curvature_term(gradient, 0.3 * inverse @ total, rows, rows @ inverse, 0.3)
    torch.testing.assert_close(found, 0.3**2 * gradient @ inverse @ rows.T @ rows @ inverse @ total)


def test_vectors_of_single_examples_add_up_to_the_second_order() -> None:
    total, rows, hessian = pieces(6, 4)
    inverse, gradient = torch.linalg.inv(hessian), normal(4, seed=9)
    first = 0.3 * inverse @ total
    each = rows.reshape(3, 2, 4)
    found = curvature_vectors(gradient, each, each @ inverse, 0.3)
    assert curvature_vectors(gradient, each.float(), each.float(), 0.3).dtype == torch.float64
    torch.testing.assert_close(found.sum(0) @ first, curvature_term(gradient, first, rows, rows @ inverse, 0.3))
    torch.testing.assert_close(found[1], 0.3 * each[1].T @ each[1] @ inverse @ gradient)


def test_nobody_in_the_group() -> None:
    nothing = torch.zeros(0, 4).double()
    assert torch.equal(newton_shift(torch.ones(4).double(), nothing, nothing, 1.0, 1.0), torch.ones(4).double())


@given(seed=st.integers(0, 1000), scale=st.floats(1.0, 3.0))
def test_the_damping_that_is_told_suffices(seed: int, scale: float) -> None:
    total, rows, hessian = pieces(3, 4, seed)
    rows = scale * 2 * rows
    inverse = torch.linalg.inv(hessian)
    spectrum = torch.linalg.eigvalsh(hessian - rows.T @ rows)
    if spectrum[0] > 0:
        newton_shift(inverse @ total, rows, rows @ inverse, 1.0, 1.0)
        return
    with pytest.raises(
        IndefiniteError, match=r"the largest eigenvalue of Ĝ H⁻¹ Ĝ\^T / n is .*, expected less"
    ) as caught:
        newton_shift(inverse @ total, rows, rows @ inverse, 1.0, 1.0)
    assert caught.value.largest >= 1
    enough = hessian + 1.0001 * caught.value.damping * torch.eye(4, dtype=torch.float64)
    assert torch.linalg.eigvalsh(enough - rows.T @ rows)[0] > 0
    newton_shift(inverse @ total, rows, rows @ inverse, 1.0, -1.0)
