from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from lightning_influence.capture.batches import batch_size, examples, explain_dtypes, leaves, map_tensors, to_device


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


def test_examples_are_cut_out_of_everything_that_holds_them() -> None:
    x = torch.arange(6).reshape(3, 2)
    names = ["a", "b", "c"]
    found = examples({"x": x, "names": names, "numbers": np.arange(3), "scale": torch.tensor(2.0), "k": 7}, slice(1, 3))
    assert torch.equal(found["x"], x[1:])
    assert found["numbers"].tolist() == [1, 2]
    assert (found["names"], found["scale"], found["k"]) == (["b", "c"], torch.tensor(2.0), 7)
    pair = examples((torch.ones(2, 1), torch.zeros(2)), slice(0, 1))  # as many items as examples, and no examples
    assert [tuple(part.shape) for part in pair] == [(1, 1), (1,)]
    named = examples(Pair(x, torch.zeros(3)), slice(0, 1))
    assert isinstance(named, Pair)
    encoded = examples(ENCODED, slice(2, 3))
    assert isinstance(encoded, BatchEncoding)
    assert encoded["labels"].shape == (1, 2)
    assert ENCODED["labels"].shape == (3, 2)


def test_examples_can_be_taken_in_any_order_and_several_times() -> None:
    batch = {"x": torch.arange(3), "names": ("a", "b", "c"), "numbers": np.arange(3), "scale": 2.0}
    found = examples(batch, [2, 0, 2])
    assert found["x"].tolist() == found["numbers"].tolist() == [2, 0, 2]
    assert (found["names"], found["scale"]) == (("c", "a", "c"), 2.0)


@pytest.mark.parametrize("other", [torch.ones(2), np.ones((1, 3))])
def test_what_is_not_laid_out_by_examples_cannot_be_cut(other: object) -> None:
    with pytest.raises(ValueError, match=r"it holds an array of shape .*, and 3 examples"):
        examples((torch.ones(3), other), slice(0, 1))


def test_numbers_of_another_precision_than_the_model_are_named() -> None:
    model = torch.nn.Linear(2, 1)
    with pytest.raises(
        ValueError,
        match=r"Linear could not be run: the batch holds torch.float64, its parameters are torch.float32 ",
    ):
        explain_dtypes((torch.ones(3, 2).double(), torch.ones(3)[:0].long()), model, RuntimeError("as told by torch"))
    explain_dtypes((torch.ones(3, 2), torch.ones(3).long()), model, RuntimeError("something else"))
