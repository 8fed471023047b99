from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset, random_split

from lightning_influence.capture.data_fingerprint import data_fingerprint


def numbers(seed: int, n: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 3, generator=generator), torch.arange(n))


def test_same_data_same_name():
    assert data_fingerprint(numbers(0)) == data_fingerprint(numbers(0))
    assert len(data_fingerprint(numbers(0))) == 16


@pytest.mark.parametrize(
    "other",
    [
        numbers(1),
        numbers(0, 39),
        TensorDataset(numbers(0).tensors[0].double(), numbers(0).tensors[1]),
        random_split(numbers(0), [40, 0], torch.Generator().manual_seed(0))[0],
    ],
    ids=["values", "length", "dtype", "order"],
)
def test_other_data_other_name(other):
    assert data_fingerprint(other) != data_fingerprint(numbers(0))


class Augmented:
    def __len__(self):
        return 5

    def __getitem__(self, k):
        return torch.rand(2), np.random.rand(2), random.random(), k  # noqa: NPY002


def test_augmentation_has_one_name_and_random_states_stay():
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    name = data_fingerprint(Augmented())
    torch.rand(7)
    assert data_fingerprint(Augmented()) == name
    torch.set_rng_state(states[0])
    data_fingerprint(Augmented())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


class Picture:
    """Its repr has an address in it, as those of images have."""


def test_objects_count_by_type():
    rows = [{"text": "a", "image": Picture(), "raw": b"x", "missing": None, "number": np.float32(2)}]
    again = [{"text": "a", "image": Picture(), "raw": b"x", "missing": None, "number": np.float32(2)}]
    assert data_fingerprint(rows) == data_fingerprint(again)
    assert data_fingerprint(rows) != data_fingerprint([{**rows[0], "text": "b"}])


def test_empty_and_single():
    assert data_fingerprint([]) != data_fingerprint([0])


def test_hugging_face_dataset():
    datasets = pytest.importorskip("datasets")
    first, second = (datasets.Dataset.from_dict({"x": [1, 2, k], "t": ["a", "b", "c"]}) for k in (3, 4))
    assert data_fingerprint(first) == data_fingerprint(first.select(range(3)))
    assert data_fingerprint(first) != data_fingerprint(second)
