from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence.estimators import Interactions
from lightning_influence.estimators.whitened import gram, kernel_features, score_features, thinned, unseen_squares
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


def test_what_the_targets_do_not_see() -> None:
    """Each pool gradient is its projection onto the span of the targets' gradients and a rest, as Pythagoras has it."""
    pool, targets = normal(9, 12), normal(5, 12, seed=1)
    kernel, scores, own = products(pool, targets)
    features, _ = score_features(scores, own)
    basis = torch.linalg.qr(targets.T).Q
    rest = pool - pool @ basis @ basis.T
    torch.testing.assert_close(unseen_squares(features, kernel.diagonal()), rest.square().sum(1))
    whole, _ = score_features(*products(pool, normal(15, 12, seed=1))[1:])
    rounding = unseen_squares(whole, kernel.diagonal())
    assert rounding.min() >= 0
    assert rounding.max() < 1e-9
    message = "`unseen_squares(features=[9, 5], squares=[8])`: expected [n, r] and [n]."
    with pytest.raises(ValueError, match=re.escape(message)):
        unseen_squares(features, kernel.diagonal()[1:])


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


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize("r", [4, 30])
@pytest.mark.parametrize("sampled", [False, True])
def test_from_features_is_from_scores_at_weight_one(r: int, sampled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    pool, targets, drawn = (torch.randn(n, r, generator=generator).double() for n in (7, 5, 3))
    names = tuple("abcdefg")
    found = Interactions.from_features(pool, targets, drawn if sampled else None, names, damping=0.1)
    fisher = drawn @ pool.T if sampled else None
    expected = Interactions.from_scores(targets @ pool.T, 1.0, fisher, names)
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(found.pairwise(names), expected.pairwise(names))
    torch.testing.assert_close(found.features @ found.features.T, pool @ pool.T)
    assert found.features.shape[1] <= 7 + 5 + 3
    assert (found.ids, found.weight, found.damping) == (names, 1.0, 0.1)
    assert found.target_curvature == expected.target_curvature


@pytest.mark.parametrize("sampled", [False, True])
def test_shares_of_targets(sampled: bool) -> None:
    """f = Σ_t a_t ℓ_t, one term after the other."""
    pool, targets, drawn = normal(7, 4), normal(3, 4, seed=1), normal(3, 4, seed=2)
    shares = torch.tensor([0.5, -0.2, 1.0]).double()
    found = Interactions.from_features(pool, targets, drawn if sampled else None, shares=shares)
    values, pairs = torch.zeros(7).double(), torch.zeros(7, 7).double()
    for share, target, fisher in zip(shares, targets, drawn if sampled else targets, strict=True):
        values += share * (pool @ target)
        pairs += share * torch.outer(pool @ fisher, pool @ fisher)
    torch.testing.assert_close(found.values, values)
    torch.testing.assert_close(found.pairwise(range(7)), pairs)
    even = Interactions.from_features(pool, targets, shares=torch.full((3,), 1 / 3).double())
    torch.testing.assert_close(even.metric, Interactions.from_features(pool, targets).metric)


def test_bad_features() -> None:
    with refused(
        "`Interactions.from_features(shares=[2])`: expected one for each of 1 targets, and as many curvature targets."
    ):
        Interactions.from_features(torch.ones(3, 2), torch.ones(1, 2), shares=torch.ones(2))
    features, call = torch.ones(3, 2), "`Interactions.from_features"
    with refused(f"{call}(features=[3, 2], targets=[2, 3])`: expected [n, r] and [m, r], with m >= 1, in one basis."):
        Interactions.from_features(features, torch.ones(2, 3))
    with refused(f"{call}(features=[3, 2], targets=[0, 2])`: expected [n, r] and [m, r], with m >= 1, in one basis."):
        Interactions.from_features(features, torch.ones(0, 2))
    features[1, 1] = torch.nan
    look = "Look at their loss, or leave them out."
    with refused(
        f"{call}(features)`: expected finite numbers. 1 of 3 examples have NaN or infinite features: id 'b'. {look}"
    ):
        Interactions.from_features(features, torch.ones(2, 2), ids=["a", "b", "c"])
    with refused(
        f"{call}(targets)`: expected finite numbers. 1 of 2 target examples have NaN or infinite targets: id 1. {look}"
    ):
        Interactions.from_features(torch.ones(3, 2), torch.tensor([[1.0, 1.0], [torch.inf, 0.0]]))
