"""Batches of token sequences for the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

IGNORED = -100  # labels of what is not supervised
Row: TypeAlias = dict[str, Tensor]  # "input_ids" and "labels" [t]; of a batch [n, t], with an "attention_mask"


def padded(rows: list[Row]) -> Row:
    def pad(values: list[Tensor], fill: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)

    return {
        "input_ids": pad([row["input_ids"] for row in rows], 0),
        "attention_mask": pad([torch.ones_like(row["input_ids"]) for row in rows], 0),
        "labels": pad([row["labels"] for row in rows], IGNORED),
    }


def batches(rows: list[Row], positions: int) -> Iterator[Row]:
    """Sorted by length, as many as fit."""
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
    while rows:
        count = max(1, positions // len(rows[0]["input_ids"]))
        yield padded(rows[:count])
        rows = rows[count:]
