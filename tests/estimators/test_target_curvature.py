from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lightning_influence import TargetMatrix, TargetProduct, TargetRows
from tests.curvature.models import normal


def test_rows_are_a_mean_of_outer_products() -> None:
    rows, vectors = normal(4, 3, 5), normal(6, 5, seed=1)
    matrix = sum(torch.outer(row, row) for row in rows.flatten(0, 1)) / 4
    target = TargetRows(rows)
    torch.testing.assert_close(target.apply(vectors), vectors @ matrix)
    torch.testing.assert_close(target.squares(vectors), (vectors @ matrix * vectors).sum(1))
    products = target.products(vectors)
    torch.testing.assert_close(products @ products.T, vectors @ matrix @ vectors.T)
    one = TargetRows(rows[:, 0])
    torch.testing.assert_close(one.apply(vectors), vectors @ rows[:, 0].T @ rows[:, 0] / 4)


def test_a_matrix_and_its_products_are_the_same() -> None:
    half, vectors = normal(5, 5), normal(6, 5, seed=1)
    matrix = half + half.T
    for target in (TargetMatrix(matrix, "mine"), TargetProduct(lambda v: v @ matrix, "mine")):
        assert target.label == "mine"
        torch.testing.assert_close(target.apply(vectors), vectors @ matrix)
        torch.testing.assert_close(target.squares(vectors), (vectors @ matrix * vectors).sum(1))
        assert target.squares(vectors[:0]).shape == (0,)


@pytest.mark.parametrize("kind", [TargetMatrix, TargetProduct, TargetRows])
def test_float32_is_summed_in_float64(kind: Any) -> None:
    given = (lambda v: v.float()) if kind is TargetProduct else torch.eye(3)
    found = kind(given).apply(torch.ones(2, 3).double())
    assert found.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TargetMatrix(torch.ones(2, 3)),
            "`TargetMatrix(matrix)`: expected a real tensor [r, r]. Got shape [2, 3].",
        ),
        (
            lambda: TargetMatrix(torch.tensor([[1.0, 2.0], [0.0, 1.0]])),
            "expected finite numbers and a symmetric matrix",
        ),
        (lambda: TargetMatrix(torch.full((2, 2), torch.nan)), "expected finite numbers and a symmetric matrix"),
        (
            lambda: TargetRows(torch.ones(3)),
            "`TargetRows(rows)`: expected a real tensor [m, r] or [m, s, r] with m >= 1.",
        ),
        (lambda: TargetRows(torch.ones(0, 3)), "Got [0, 3]."),
        (
            lambda: TargetRows(torch.tensor([[1.0, 1.0], [1.0, torch.inf]])),
            "`TargetRows(rows)`: expected finite numbers; those of examples [1] are not.",
        ),
    ],
)
def test_bad_parts(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
