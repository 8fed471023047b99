from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.metrics.class_entropy import ClassEntropy, class_entropy

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=30)


def oracle(labels):
    shares = [count / len(labels) for count in Counter(labels).values()]
    return -math.fsum(p * math.log(p) for p in shares)


@given(labels=LABELS)
def test_equals_the_formula(labels):
    expected = pytest.approx(oracle(labels), abs=1e-6)
    assert class_entropy(torch.tensor(labels)).item() == expected
    assert class_entropy(torch.tensor(labels), num_classes=9).item() == expected


@given(batches=st.lists(st.lists(st.integers(0, 6), max_size=8), min_size=1, max_size=5).filter(any))
def test_updates_and_ranks_add_up(batches):
    ranks = [ClassEntropy(7), ClassEntropy(7)]
    for index, batch in enumerate(batches):
        ranks[index % 2].update(torch.tensor(batch, dtype=torch.long))
    merged = ClassEntropy(7)
    merged.update(torch.tensor([], dtype=torch.long))
    for rank in ranks:
        merged.merge_state({"counts": rank.counts})
    everything = torch.tensor([label for batch in batches for label in batch])
    assert torch.equal(merged.compute(), class_entropy(everything, num_classes=7))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([3], 0.0),
        ([2, 2, 2], 0.0),
        ([0, 1, 2, 3], math.log(4)),
        ([[0, 5], [5, 0]], math.log(2)),
    ],
)
def test_known_values(labels, expected):
    entropy = class_entropy(torch.tensor(labels))
    assert entropy.dtype == torch.float32
    assert entropy.shape == ()
    assert entropy.item() == pytest.approx(expected, abs=1e-7)


def test_any_integer_type():
    for dtype in (torch.uint8, torch.int32, torch.bool):
        labels = torch.tensor([0, 1], dtype=dtype)
        assert class_entropy(labels).item() == pytest.approx(math.log(2))


def test_forward_gives_the_batch_and_keeps_the_whole():
    metric = ClassEntropy(3)
    assert metric(torch.tensor([0, 0])).item() == 0.0
    assert metric(torch.tensor([1, 1])).item() == 0.0
    assert metric.compute().item() == pytest.approx(math.log(2))
    metric.reset()
    assert metric.counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.5]), r"`{}\(labels\)`: expected whole numbers, got torch.float32"),
        (torch.tensor([0, -1]), r"`{}\(labels\)`: expected classes >= 0 and < 3, got \[-1\]"),
        (torch.tensor([0, 3, 9]), r"`{}\(labels\)`: expected classes >= 0 and < 3, got \[3, 9\]"),
    ],
)
def test_labels_that_are_no_classes(labels, message):
    with pytest.raises(ValueError, match=message.format("class_entropy")):
        class_entropy(labels, num_classes=3)
    with pytest.raises(ValueError, match=message.format("ClassEntropy.update")):
        ClassEntropy(3).update(labels)


def test_no_labels():
    nothing = torch.tensor([], dtype=torch.long)
    with pytest.raises(ValueError, match="class entropy of no label: expected at least one example"):
        class_entropy(nothing)
    metric = ClassEntropy(3)
    metric.update(nothing)
    with pytest.raises(ValueError, match="class entropy of no label"):
        metric.compute()


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, True])
def test_number_of_classes(num_classes):
    with pytest.raises(ValueError, match=r"`ClassEntropy\(num_classes=.*\)`: expected an int >= 1"):
        ClassEntropy(num_classes)
