from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from lightning_influence.capture import ExampleLoader

ROWS = TensorDataset(torch.arange(7) * 10, torch.arange(7) % 2)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Touchy(DataLoader):
    """A loader that must not be iterated: the running fit would notice."""

    def __iter__(self) -> Any:
        raise AssertionError("iterated")


def seen(loader: ExampleLoader) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), batch[0].tolist()) for ids, batch in loader]


def test_batches_in_order_with_their_ids() -> None:
    loader = ExampleLoader(ROWS, batch_size=3)
    assert seen(loader) == [([0, 1, 2], [0, 10, 20]), ([3, 4, 5], [30, 40, 50]), ([6], [60])]
    assert seen(loader) == seen(loader)
    assert (len(loader), loader.num_examples, loader.ids) == (3, 7, list(range(7)))
    assert next(iter(loader))[0].dtype == torch.int64


@pytest.mark.parametrize("size", [1, 2, 6, 7, 8])
def test_the_number_of_batches(size: int) -> None:
    loader = ExampleLoader(ROWS, size)
    assert len(loader) == len(list(loader))
    assert [k for ids, _ in loader for k in ids.tolist()] == list(range(7))


def test_some_positions_in_the_order_given() -> None:
    loader = ExampleLoader(ROWS, 2, indices=[5, 0, 3])
    assert seen(loader) == [([5, 0], [50, 0]), ([3], [30])]
    assert seen(ExampleLoader(loader)) == seen(loader)
    assert seen(ExampleLoader(loader, 3)) == [([5, 0, 3], [50, 0, 30])]
    assert seen(ExampleLoader(loader, indices=torch.tensor([6]))) == [([6], [60])]  # positions in the whole dataset


def doubled(rows: list[Any]) -> tuple[torch.Tensor]:
    return (torch.stack([row[0] for row in rows]) * 2,)


def test_a_loader_is_read_and_never_iterated() -> None:
    state = torch.random.get_rng_state()
    loader = Touchy(ROWS, batch_size=4, shuffle=True, collate_fn=doubled, generator=torch.Generator().manual_seed(3))
    before = loader.generator.get_state()
    assert seen(ExampleLoader(loader)) == [([0, 1, 2, 3], [0, 20, 40, 60]), ([4, 5, 6], [80, 100, 120])]
    assert ExampleLoader(loader, batch_size=2).batch_size == 2
    assert torch.equal(loader.generator.get_state(), before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_loader_with_a_batch_sampler_of_its_own() -> None:
    loader = Touchy(ROWS, batch_sampler=BatchSampler(SequentialSampler(ROWS), 5, drop_last=True))
    assert ExampleLoader(loader).batch_size == 5
    assert ExampleLoader(Touchy(ROWS, batch_sampler=[[0, 1], [2]])).batch_size == 32


def test_datasets_that_fetch_several_rows_at_once() -> None:
    class Fetching(Dataset):
        def __len__(self) -> int:
            return 4

        def __getitems__(self, ids: list[int]) -> list[torch.Tensor]:
            return [torch.tensor([k]) for k in ids]

    assert [batch.flatten().tolist() for _, batch in ExampleLoader(Fetching(), 3)] == [[0, 1, 2], [3]]


def test_hugging_face_datasets() -> None:
    data = datasets.Dataset.from_dict({"x": [[1.0], [2.0], [3.0]], "labels": [0, 1, 0]}).with_format("torch")
    [(ids, batch)] = ExampleLoader(data, indices=[2, 0])
    assert ids.tolist() == [2, 0]
    assert batch["x"].tolist() == [[3.0], [1.0]]
    assert batch["labels"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (Stream(), "Stream"),
        (DataLoader(Stream()), "Stream"),
        (datasets.Dataset.from_dict({"x": [1]}).to_iterable_dataset(), "IterableDataset"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"x": [1]})}), "DatasetDict"),
        ("train.jsonl", "str"),
        ({"x": [1]}, "dict"),
        (iter([1]), "list_iterator"),
        (3, "int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_examples_without_a_position_are_refused(data: Any, name: str) -> None:
    message = rf"`ExampleLoader\({name}\)`: examples need stable ids. Expected a map-style dataset"
    with pytest.raises(ValueError, match=message):
        ExampleLoader(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": []}, r"`ExampleLoader\(list\)`: the data is empty; expected at least one example"),
        ({"data": ROWS, "indices": []}, r"`ExampleLoader\(TensorDataset\)`: the data is empty"),
        ({"data": ROWS, "indices": [0, 7, -1]}, r"`ExampleLoader\(indices\)`: \[7, -1\] lie outside the dataset of 7"),
        ({"data": ROWS, "batch_size": 0}, r"`ExampleLoader\(batch_size=0\)`: expected an int >= 1"),
        ({"data": DataLoader(ROWS), "batch_size": 0}, r"`ExampleLoader\(batch_size=0\)`"),
        ({"data": ROWS, "batch_size": 2.5}, r"`ExampleLoader\(batch_size=2.5\)`: expected an int >= 1"),
        ({"data": DataLoader(ROWS, batch_size=None)}, r"yields ready batches, whose examples have no ids"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExampleLoader(**arguments)
