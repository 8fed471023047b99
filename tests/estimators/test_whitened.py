from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from lightning_influence.estimators.whitened import gram, kernel_features, score_features, thinned
from tests.curvature.models import normal


def products(pool: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pool x pool, targets x pool, targets x targets."""
    return pool @ pool.T, targets @ pool.T, targets @ targets.T


def test_features_of_scores_are_seen_by_the_targets() -> None:
    """Every pool gradient is replaced by its projection onto the span of the targets' gradients."""
    pool, targets = normal(9, 12), normal(5, 12, seed=1)
    _, scores, own = products(pool, targets)
    basis = torch.linalg.qr(targets.T).Q
    seen = pool @ basis @ basis.T
    for found, expected in zip(products(*score_features(scores, own)), products(seen, targets), strict=True):
        torch.testing.assert_close(found, expected)


def test_targets_that_span_everything_lose_nothing() -> None:
    pool, targets = normal(9, 4), normal(7, 4, seed=1)
    found = score_features(*products(pool, targets)[1:])
    assert found[0].shape == (9, 4)  # the three directions too many are rounding
    for one, other in zip(products(*found), products(pool, targets), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("r", [3, 40])
def test_features_of_kernels_have_these_inner_products(r: int) -> None:
    pool, targets = normal(9, r), normal(5, r, seed=1)
    expected = products(pool, targets)
    found = kernel_features(*expected)
    assert found[0].shape == (9, min(r, 14))
    for one, other in zip(products(*found), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_long_rows_are_made_short(dtype: torch.dtype) -> None:
    pool, targets = normal(6, 5000).to(dtype), normal(3, 5000, seed=1).to(dtype)
    found = thinned(pool, targets)
    assert found[0].shape == (6, 9)
    for one, other in zip(products(*found), products(pool.double(), targets.double()), strict=True):
        torch.testing.assert_close(one, other)
    short = (pool[:, :9], targets[:, :9])
    assert thinned(*short)[0] is short[0]


def test_inner_products_are_summed_in_float64() -> None:
    left, right = torch.full((1, 10_000), 0.1), torch.full((2, 10_000), 0.1)
    torch.testing.assert_close(gram(left, right), left.double() @ right.double().T, rtol=1e-13, atol=0)


def test_refusals() -> None:
    message = "`score_features(scores=[4, 9], target_scores=[5, 5])`: expected [m, n] and [m, m], of the same targets."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        score_features(torch.zeros(4, 9), torch.zeros(5, 5))
    message = (
        "`kernel_features(kernel=[9, 8], scores=[5, 9], target_scores=[5, 5])`: expected [n, n], [m, n] and [m, m]."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kernel_features(torch.zeros(9, 8), torch.zeros(5, 9), torch.zeros(5, 5))
    with pytest.raises(ValueError, match="`score_features`: all scores are 0; expected examples with gradients"):
        score_features(torch.zeros(5, 9), torch.zeros(5, 5))
