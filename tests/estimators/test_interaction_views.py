from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence import Interactions, Spectrum
from tests.curvature.models import normal


def pool(n: int, r: int, seed: int = 0, metric: bool = True) -> tuple[Interactions, Tensor]:
    """Interactions, and K by hand; the metric is indefinite."""
    features, half = normal(n, r, seed=seed), normal(r, r, seed=seed + 1)
    matrix = half + half.T if metric else torch.eye(r).double()
    found = Interactions(normal(n), features, matrix if metric else None, ids=range(n), weight=1 / n)
    return found, features @ matrix @ features.T


@given(n=st.integers(1, 9), r=st.integers(1, 6), seed=st.integers(0, 1000), metric=st.booleans())
def test_spectrum_is_that_of_the_matrix(n: int, r: int, seed: int, metric: bool) -> None:
    interactions, K = pool(n, r, seed, metric)
    found = interactions.spectrum()
    values = torch.linalg.eigvalsh(K)
    expected = values[values.abs().argsort(descending=True)][: min(n, r)]
    padded = torch.zeros_like(expected)
    padded[: len(found.eigenvalues)] = found.eigenvalues
    torch.testing.assert_close(padded, expected, rtol=1e-8, atol=1e-9 * float(values.abs().max()))
    assert found.num_examples == n
    assert float(found.shares()[-1]) == pytest.approx(1)


def test_shares_of_the_leading_directions() -> None:
    found = Spectrum(torch.tensor([6.0, -3.0, 1.0]).double(), 7)
    torch.testing.assert_close(found.shares(), torch.tensor([0.6, 0.9, 1.0]).double())
    assert [found.rank(share) for share in (0.5, 0.6, 0.61, 0.9, 1.0)] == [1, 1, 2, 2, 3]
    with pytest.raises(
        ValueError, match=re.escape("`Spectrum.rank(share=0)`: expected a share in (0, 1], such as 0.9")
    ):
        found.rank(0)


@given(seed=st.integers(0, 1000), metric=st.booleans())
def test_means_between_classes(seed: int, metric: bool) -> None:
    interactions, K = pool(9, 4, seed, metric)
    names = ["b", "a", "c", "a", "b", "a", "b", "a", "b"]
    found = interactions.mean_interactions(names)
    assert found.labels == ("a", "b", "c")
    assert found.counts.tolist() == [4, 4, 1]
    for x, one in enumerate(found.labels):
        for y, other in enumerate(found.labels):
            pairs = [
                float(K[i, j]) for i in range(9) for j in range(9) if i != j and names[i] == one and names[j] == other
            ]
            mean = sum(pairs) / len(pairs) if pairs else math.nan
            assert float(found.values[x, y]) == pytest.approx(mean, abs=1e-10, nan_ok=True)


def test_a_permuted_pool_has_the_same_views() -> None:
    interactions, _ = pool(9, 4)
    names, order = torch.arange(9) % 3, torch.tensor([4, 0, 8, 2, 6, 1, 5, 3, 7])
    shuffled = Interactions(
        interactions.values[order], interactions.features[order], interactions.metric, ids=order.tolist(), weight=1.0
    )
    torch.testing.assert_close(
        shuffled.mean_interactions(names[order]).values, interactions.mean_interactions(names).values
    )
    torch.testing.assert_close(shuffled.spectrum().eigenvalues, interactions.spectrum().eigenvalues)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"] * 8, "`mean_interactions(labels)`: expected one label for each of the 9 values. Got 8."),
        (["a"] * 8 + [1], "`mean_interactions(labels)`: expected labels that are all int or all str. Got int, str."),
    ],
)
def test_bad_labels(names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pool(9, 4)[0].mean_interactions(names)
