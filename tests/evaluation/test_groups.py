from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.evaluation.groups import neighbour_groups, random_subsets


@given(n=st.integers(1, 12), data=st.data())
def test_groups_are_the_nearest_with_the_anchor_first(n, data):
    size, count = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))
    values = data.draw(st.lists(st.integers(0, 3), min_size=2 * n, max_size=2 * n))  # many ties
    outputs = torch.tensor(values).reshape(n, 2)
    groups = neighbour_groups(outputs, size, count)
    assert len({group[0] for group in groups}) == len(groups) == count
    for group in groups:
        others = [k for k in range(n) if k != group[0]]
        others.sort(key=lambda k: math.dist(outputs[k].tolist(), outputs[group[0]].tolist()))
        assert group[1:] == tuple(others[: size - 1])


def test_ids_anchors_and_seeds():
    outputs = torch.tensor([0.0, 1.0, 0.1, 0.8])
    assert neighbour_groups(outputs, 2, ids=list("abcd"), anchors=["d"]) == [("d", "b")]
    assert neighbour_groups(outputs[:, None], 2, anchors=[2]) == [(2, 0)]
    many = torch.arange(30.0)
    assert neighbour_groups(many, 3, 5) == neighbour_groups(many, 3, 5) != neighbour_groups(many, 3, 5, seed=1)


@pytest.mark.parametrize(
    ("outputs", "options", "message"),
    [
        (torch.ones(2, 2, 2), {"size": 1}, r"expected \[n\] or \[n, classes\], n >= 1. Got shape \[2, 2, 2\]"),
        (torch.tensor([0.0, math.nan]), {"size": 1, "ids": ["a", "b"]}, r"those of ids \['b'\] are not"),
        (torch.ones(3), {"size": 4}, r"\(size=4\)`: expected an int from 1 to 3"),
        (torch.ones(3), {"size": 1, "count": 0}, r"\(count=0\)`: expected an int from 1 to 3"),
        (torch.ones(3), {"size": 1}, r"\(count=50\)`"),
        (torch.ones(3), {"size": 1, "anchors": [0, 7]}, r"Unknown: \[7\]"),
        (torch.ones(3), {"size": 1, "anchors": []}, "at least one"),
    ],
)
def test_groups_that_cannot_be(outputs, options, message):
    with pytest.raises(ValueError, match=message):
        neighbour_groups(outputs, **options)


def test_random_subsets():
    subsets = random_subsets(10, 400, 0.3)
    assert {len(set(subset)) for subset in subsets} == {3}
    times = Counter(k for subset in subsets for k in subset)
    assert all(times[k] == pytest.approx(120, abs=40) for k in range(10))
    assert subsets == random_subsets(10, 400, 0.3) != random_subsets(10, 400, 0.3, seed=1)
    assert set(random_subsets("ab", 20)) == {("a",), ("b",)}


@pytest.mark.parametrize(
    ("ids", "count", "share", "message"),
    [
        (4, 0, 0.5, r"\(count=0\)`: expected an int >= 1"),
        (4, 1, 1.0, r"\(share=1.0\)`: expected a share in \(0, 1\)"),
        (4, 1, 0.1, "at least one of 4 examples in and one out"),
        (4, 1, 0.9, "at least one of 4 examples in and one out"),
        ([1, 1], 1, 0.5, "1"),
    ],
)
def test_subsets_that_cannot_be(ids, count, share, message):
    with pytest.raises(ValueError, match=message):
        random_subsets(ids, count, share)
