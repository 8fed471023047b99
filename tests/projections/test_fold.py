from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.projections.fold import Fold, random_signs
from tests.projections.cases import normal

sizes = st.integers(1, 60)


def matrix(fold: Fold, size: int) -> Tensor:
    """[b, d], column by column."""
    return fold(torch.eye(size)).T


@given(size=sizes, buckets=sizes, seed=st.integers(0, 10**6))
def test_every_coordinate_goes_to_one_bucket_with_a_sign(size: int, buckets: int, seed: int) -> None:
    fold = Fold.draw(size, buckets, seed)
    found = matrix(fold, size)
    assert found.shape == (buckets, size)
    assert torch.equal(found.abs().sum(0), torch.ones(size))
    places = fold.places()
    assert torch.equal(found.abs().argmax(0), places)
    assert torch.equal(found.sum(0), fold.signs)
    counts = torch.bincount(places, minlength=buckets)
    assert counts.max() - counts.min() <= (2 if size > buckets else 1)
    for start in range(0, size, buckets):  # coordinates of one stretch never share a bucket
        stretch = places[start : start + buckets]
        assert len(stretch.unique()) == len(stretch)


@given(size=sizes, buckets=sizes)
def test_any_leading_dimensions(size: int, buckets: int) -> None:
    fold = Fold.draw(size, buckets, 0)
    vectors = normal(2, 3, size)
    found = fold(vectors)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, vectors @ matrix(fold, size).double().T)
    torch.testing.assert_close(fold(vectors.transpose(0, 1)), found.transpose(0, 1))


@pytest.mark.parametrize(("size", "buckets"), [(20, 4), (20, 19), (12, 5)])
def test_pairs_share_a_bucket_by_chance(size: int, buckets: int) -> None:
    """Coordinates of different stretches with probability 1 / b, with either sign."""
    draws = 1000
    together, signed = torch.zeros(size, size).double(), torch.zeros(size, size).double()
    for seed in range(draws):
        gram = matrix(fold := Fold.draw(size, buckets, seed), size).T @ matrix(fold, size)
        together += gram.abs() / draws
        signed += gram / draws
    stretch = torch.arange(size) // buckets
    other = stretch[:, None] != stretch
    assert (together[other] - 1 / buckets).abs().max() < 5 * (1 / buckets / draws) ** 0.5
    torch.testing.assert_close(signed[~other], torch.eye(size).double()[~other])
    assert signed[other].abs().max() < 5 * (1 / buckets / draws) ** 0.5


def test_nothing_is_lost_where_there_is_room() -> None:
    vectors = normal(4, 6)
    for buckets in (6, 9):
        folded = Fold.draw(6, buckets, 1)(vectors)
        torch.testing.assert_close(folded @ folded.T, vectors @ vectors.T)


def test_draws() -> None:
    one, other = Fold.draw(50, 7, 3), Fold.draw(50, 7, 3, torch.device("cpu"))
    assert torch.equal(one.signs, other.signs)
    assert torch.equal(one.order, other.order)
    assert one.offsets == other.offsets
    assert one.num_bytes == 4 * 50 + 8 * 7
    signs = random_signs(10_000, torch.Generator().manual_seed(0))
    assert signs.unique().tolist() == [-1, 1]
    assert signs.mean().abs() < 0.05
