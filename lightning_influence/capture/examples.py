"""Examples of a dataset in a fixed order with their ids, without touching the user's own loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate


class ExampleLoader:
    """Iterates ``(ids, batch)`` over a map-style dataset, sequentially and without workers.

    The user's loader is read for its dataset, collate function and batch size, and never iterated: that would
    move its generator, restart persistent workers, and shuffle ids away.

    Args:
        data: A map-style dataset (torch or Hugging Face ``datasets``) or a DataLoader over one.
        batch_size: Examples per batch; None takes the loader's, or 32.
        collate_fn: None takes the loader's, or torch's default.
        indices: Positions to visit, in this order; None for all. Ids are positions in the whole dataset.

    Raises:
        ValueError: If the data is empty, cannot be indexed, or an index lies outside.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        dataset: Any = data
        if isinstance(data, ExampleLoader):
            dataset, indices = data.dataset, list(data.ids) if indices is None else indices
            batch_size, collate_fn = batch_size or data.batch_size, collate_fn or data.collate_fn
        elif isinstance(data, DataLoader):
            dataset, collate_fn = data.dataset, collate_fn or data.collate_fn
            batch_size = batch_size or data.batch_size or getattr(data.batch_sampler, "batch_size", None)
        if (
            isinstance(dataset, IterableDataset)
            or not hasattr(dataset, "__getitem__")
            or not hasattr(dataset, "__len__")
        ):
            raise ValueError(
                f"ExampleLoader({type(dataset).__name__}): examples need stable ids. Expected a map-style dataset "
                "with __len__ and __getitem__, or a DataLoader over one."
            )
        size = len(cast(Sized, dataset))
        self.ids: list[int] = list(range(size)) if indices is None else [int(k) for k in indices]
        if not self.ids:
            raise ValueError(
                f"ExampleLoader({type(dataset).__name__}): the data is empty; expected at least one example."
            )
        outside = [k for k in self.ids if not 0 <= k < size]
        if outside:
            raise ValueError(f"ExampleLoader: indices {outside[:5]} lie outside the dataset of {size} examples.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"ExampleLoader(batch_size={batch_size}): expected an int >= 1.")
        self.dataset: Dataset[Any] = dataset
        self.batch_size: int = batch_size or 32
        self.collate_fn: Callable[[list[Any]], Any] = collate_fn or default_collate

    @property
    def num_examples(self) -> int:
        """Number of examples that are visited."""
        return len(self.ids)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.ids) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        """Yield (ids int64 [n], collated batch)."""
        for start in range(0, len(self.ids), self.batch_size):
            ids = self.ids[start : start + self.batch_size]
            fetch = getattr(self.dataset, "__getitems__", None)
            rows = fetch(ids) if fetch is not None else [self.dataset[k] for k in ids]
            yield torch.tensor(ids, dtype=torch.int64), self.collate_fn(rows)
