from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from lightning_influence.capture.batches import batch_size, leaves, map_tensors, to_device


class Pair(NamedTuple):
    inputs: Tensor
    labels: Tensor


ENCODED = BatchEncoding({"input_ids": torch.ones(3, 2), "labels": torch.ones(3, 2)})


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(3),
        (torch.ones(3, 2), torch.ones(3)),
        [torch.tensor(1.0), torch.ones(3)],
        {"scale": 2, "names": ["a", "b"], "x": torch.ones(3, 1)},
        {"inputs": (torch.ones(3), torch.ones(2))},
        Pair(torch.ones(3), torch.ones(3)),
        ENCODED,
        (ENCODED, torch.ones(3)),
    ],
    ids=["tensor", "pair", "scalar first", "mapping", "nested", "named", "encoding", "encoding inside"],
)
def test_the_size_is_that_of_the_first_tensor(batch: object) -> None:
    assert batch_size(batch) == 3


@pytest.mark.parametrize("batch", [[], {"text": "a"}, torch.tensor(1.0), None, "abc"])
def test_a_batch_without_tensors_has_no_size(batch: object) -> None:
    message = f"a batch of type {type(batch).__name__} holds no tensor; expected tensors with examples first"
    with pytest.raises(ValueError, match=message):
        batch_size(batch)


def test_containers_keep_their_types() -> None:
    moved = to_device((ENCODED, Pair(torch.ones(3), torch.ones(3)), "text", None), torch.device("meta"))
    encoded, pair, *rest = moved
    assert isinstance(encoded, BatchEncoding)
    assert encoded.input_ids.device.type == pair.labels.device.type == "meta"
    assert isinstance(pair, Pair)
    assert rest == ["text", None]
    assert ENCODED["input_ids"].device.type == "cpu"  # the batch itself stays as it was


def test_functions_reach_every_tensor() -> None:
    doubled = map_tensors({"a": [torch.ones(1)], "b": ENCODED}, lambda t: t * 2)
    assert all(torch.equal(leaf, torch.full_like(leaf, 2)) for leaf in leaves(doubled))
    assert len(leaves(doubled)) == 3
