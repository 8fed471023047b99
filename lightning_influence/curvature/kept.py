"""Records of one pass that serve the next one too, within a budget of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields

from torch import Tensor

from lightning_influence.capture import LayerRecord


class KeptRecords:
    """Whole batches, first come, first kept.

    Args:
        budget: Bytes of the tensors that are kept, on whatever device they are.

    Raises:
        ValueError: If the budget is none.
    """

    def __init__(self, budget: int) -> None:
        if type(budget) is not int or budget < 0:
            raise ValueError(f"`fit(memory_budget={budget!r})`: expected a number of bytes, an int >= 0.")
        self.left = budget
        self.batches: list[list[LayerRecord]] = []

    @property
    def ids(self) -> set[int]:
        """Of the examples that are kept."""
        return {k for records in self.batches for k in records[0].ids.tolist()}

    def keeping(self, records: Iterable[LayerRecord]) -> Iterator[LayerRecord]:
        """The records of a batch, kept once the last of them is through, if they fit."""
        batch: list[LayerRecord] = []
        sizes: dict[int, int] = {}
        for record in records:
            yield record
            if sum(sizes.values()) > self.left:
                batch = []
                continue
            batch.append(record)
            # Layers share inputs, and a tensor that is a part of another keeps all of it alive.
            sizes |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(record)}
        if batch and sum(sizes.values()) <= self.left:
            self.batches.append(batch)
            self.left -= sum(sizes.values())


def _tensors(record: LayerRecord) -> Iterator[Tensor]:
    for field in fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            for part in value:
                yield from _tensors(part)
