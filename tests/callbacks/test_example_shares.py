from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_influence.callbacks.example_shares import joined_columns, own_part, read_as_training, weights_label
from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.estimators.scores import Scores


def rank(k: int, size: int) -> Any:
    return SimpleNamespace(trainer=SimpleNamespace(global_rank=k, world_size=size), checkpoint=None, step=7)


def test_parts_of_the_ranks_are_put_together_in_the_order_of_the_data() -> None:
    examples = ExampleLoader(list(range(9)), indices=[8, 3, 5, 1, 0])
    parts = []
    for k in range(6):
        own = own_part(rank(k, 6), examples)
        ids = () if own is None else tuple(own.ids)
        parts.append(None if own is None else Scores(torch.tensor([ids]).double(), (0,), ids, "dot", "sum"))
    assert parts[5] is None
    found = joined_columns(parts, examples.ids)
    assert found.train_ids == (8, 3, 5, 1, 0)
    assert found.values.tolist() == [[8, 3, 5, 1, 0]]


def test_a_dataset_is_read_as_the_training_data() -> None:
    def double(rows: list[int]) -> list[int]:
        return [2 * row for row in rows]

    train = DataLoader([1, 2, 3], batch_size=2, collate_fn=double)
    trainer = SimpleNamespace(datamodule=None, train_dataloader=train)
    for given in (None, train):
        loader = read_as_training("here", trainer, [5, 6, 7], given, None, "queries")  # type: ignore[arg-type]
        assert [batch for _, batch in loader] == [[10, 12], [14]]
    own = DataLoader([5], batch_size=1)
    assert read_as_training("here", trainer, own, None, 4, "queries").batch_size == 4  # type: ignore[arg-type]
    trainer.train_dataloader = object()
    assert read_as_training("here", trainer, [5], None, None, "queries").batch_size == 32  # type: ignore[arg-type]


def test_where_the_weights_are() -> None:
    assert weights_label(rank(0, 1)) == "step=7"
