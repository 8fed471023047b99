"""Batches of examples of about the same length, as many as a number of positions allows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from lightning_influence.capture import ExampleLoader


class SortedLoader(ExampleLoader):
    """An `ExampleLoader` whose batches hold few idle positions: longest examples first, ties by id.

    Args:
        loader: The examples; its batch size is the most that a batch holds.
        lengths: Positions of each, in the order of ``loader.ids``.
        positions: Most positions of a batch, padding included; a longer example is a batch of its own.

    Raises:
        ValueError: If lengths are missing, or ``positions`` is not an int >= 1.
    """

    def __init__(self, loader: ExampleLoader, lengths: Sequence[int], positions: int) -> None:
        if len(lengths) != loader.num_examples:
            raise ValueError(f"`SortedLoader(lengths)`: got {len(lengths)} for {loader.num_examples} examples.")
        if isinstance(positions, bool) or not isinstance(positions, int) or positions < 1:
            raise ValueError(f"`SortedLoader(positions={positions!r})`: expected an int >= 1.")
        order = sorted(zip(lengths, loader.ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
        super().__init__(loader, indices=[k for _, k in order])
        self.batches: list[list[int]] = []
        longest = 0
        for length, k in order:
            batch = self.batches[-1] if self.batches else []
            if not batch or len(batch) == self.batch_size or longest * (len(batch) + 1) > positions:
                self.batches.append([])
                longest = length
            self.batches[-1].append(k)

    def after(self, count: int) -> SortedLoader:
        """Without the first batches."""
        rest = copy.copy(self)
        rest.batches = self.batches[count:]
        return rest

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        """Yield (ids int64 [n], collated batch)."""
        for ids in self.batches:
            yield from ExampleLoader(self, batch_size=len(ids), indices=ids)
