from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.curvature.spectrum import lanczos, random_start, spectrum_ends
from tests.curvature.models import normal


def matrix_of(values: list[float]) -> Tensor:
    basis = torch.linalg.qr(normal(len(values), len(values)))[0]
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_pairs_are_those_of_the_operator_within_the_space(size: int, steps: int, seed: int) -> None:
    """Ritz pairs: orthonormal, with residuals orthogonal to the space; never outside the spectrum."""
    drawn = normal(size, size, seed=seed)
    matrix = drawn + drawn.T
    values, vectors = lanczos(lambda v: v @ matrix, normal(size, seed=seed + 1), steps)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors), dtype=torch.float64))
    torch.testing.assert_close(vectors @ matrix @ vectors.T, torch.diag(values), rtol=1e-7, atol=1e-7)
    ends = torch.linalg.eigvalsh(matrix)
    assert ends[0] - 1e-9 <= values[-1] <= values[0] <= ends[-1] + 1e-9
    assert bool((values.diff() <= 0).all())


def test_the_whole_space_gives_all_eigenpairs() -> None:
    matrix = matrix_of([5.0, 3.0, 1.0, -2.0, 0.0, 0.5])
    values, vectors = lanczos(lambda v: v @ matrix, normal(6), 6)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix).flip(0))
    torch.testing.assert_close(vectors @ matrix, values[:, None] * vectors)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(6, dtype=torch.float64))
    leading = lanczos(lambda v: v @ matrix, normal(6), 6, rank=2)
    assert torch.equal(leading[0], values[:2])
    torch.testing.assert_close(leading[1], vectors[:2])


def test_it_stops_where_the_space_is_invariant() -> None:
    matrix = matrix_of([4.0, 4.0, 1.0, 0.0, 0.0, 0.0])
    calls = []

    def operator(v: Tensor) -> Tensor:
        calls.append(v)
        return v @ matrix

    values, _ = lanczos(operator, normal(6), 6)
    assert len(calls) == 3  # one direction for each distinct eigenvalue
    torch.testing.assert_close(values, torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    values, vectors = lanczos(lambda v: 0 * v, normal(4), 3)
    assert values.tolist() == [0.0]
    assert vectors.shape == (1, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leading_pairs_of_a_large_spectrum_come_first_and_once(dtype: torch.dtype) -> None:
    matrix = matrix_of([0.8**k for k in range(60)]).to(dtype)
    values, vectors = lanczos(lambda v: v @ matrix, normal(60).to(dtype), 40)
    torch.testing.assert_close(values[:8], torch.tensor([0.8**k for k in range(8)]).double(), rtol=1e-5, atol=1e-6)
    assert vectors.dtype == dtype
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(40, dtype=dtype), rtol=0, atol=1e-5)


def test_ends_are_approached_from_inside() -> None:
    matrix = matrix_of([*(0.1 * k for k in range(50)), 9.0, -3.0])
    low, high = spectrum_ends(lambda v: v @ matrix, normal(52))
    assert -3.0 - 1e-9 <= low <= -2.99
    assert 8.99 <= high <= 9.0 + 1e-9


def test_starts_depend_on_the_seed_alone() -> None:
    one = random_start(5, 3, torch.zeros(0, dtype=torch.float32))
    assert torch.equal(one, random_start(5, 3, torch.zeros(0, dtype=torch.float64)).float())
    assert not torch.equal(one, random_start(5, 4, torch.zeros(0)))
