"""Examples of a dataset in a fixed order with their ids, without touching the user's own loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from lightning_influence.capture.unfit import collated

TRAIN = "training examples"  # what they are called in an error


class ExampleLoader:
    """Iterates ``(ids, batch)`` over a map-style dataset, sequentially and without workers.

    The user's loader is read for its dataset, collate function and batch size, and never iterated: that would
    move its generator, restart persistent workers, and shuffle ids away.

    Args:
        data: A map-style dataset (torch or Hugging Face ``datasets``) or a DataLoader over one.
        batch_size: Examples per batch; None takes the loader's, or 32.
        collate_fn: None takes the loader's, or torch's default.
        indices: Positions to visit, in this order; None for all. Ids are positions in the whole dataset.
        omitted: Positions that were left out because they could not be used, to be told where results are kept.
        what: What to call the examples in an error, unless ``data`` tells; None for "examples".

    Raises:
        ValueError: If the data is empty, cannot be indexed, or an index lies outside; while iterating, if examples do
            not go into one batch (ids are named).
    """

    def __init__(
        self,
        data: Any,
        batch_size: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        indices: Sequence[int] | None = None,
        omitted: Sequence[int] = (),
        what: str | None = None,
    ) -> None:
        self.omitted: tuple[int, ...] = tuple(omitted)
        self.what: str = what or "examples"
        if isinstance(data, ExampleLoader):
            self.omitted = self.omitted or data.omitted
            self.what = self.what if data.what == "examples" else data.what
            indices = data.ids if indices is None else indices
            batch_size = data.batch_size if batch_size is None else batch_size
        elif isinstance(data, DataLoader):
            batch_size = _loader_batch_size(data) if batch_size is None else batch_size
        if isinstance(data, (ExampleLoader, DataLoader)):
            data, collate_fn = data.dataset, collate_fn or data.collate_fn
        size = _checked_size(data)
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise ValueError(f"`ExampleLoader(batch_size={batch_size!r})`: expected an int >= 1.")
        self.ids: list[int] = list(range(size)) if indices is None else [int(k) for k in indices]
        if not self.ids:
            raise ValueError(
                f"`ExampleLoader({type(data).__name__})`: the data is empty; expected at least one example."
            )
        outside = [k for k in self.ids if not 0 <= k < size]
        if outside:
            raise ValueError(f"`ExampleLoader(indices)`: {outside[:5]} lie outside the dataset of {size} examples.")
        self.dataset: Dataset[Any] = data
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
            yield torch.tensor(ids, dtype=torch.int64), collated(self.collate_fn, rows, ids, self.what)


def _checked_size(dataset: Any) -> int:
    """Number of examples of a map-style dataset."""
    wrong = isinstance(dataset, (str, bytes, Mapping, IterableDataset))
    if wrong or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"`ExampleLoader({type(dataset).__name__})`: examples need stable ids. Expected a map-style dataset with "
            "__len__ and __getitem__, or a DataLoader over one; of a dictionary of splits pass one split, of a stream "
            "StreamedExamples(stream, length)."
        )
    return len(cast(Sized, dataset))


def _loader_batch_size(loader: DataLoader[Any]) -> int | None:
    """The batch size of a loader, also of one with a batch sampler of its own where that tells it."""
    if loader.batch_sampler is None:
        raise ValueError(
            "`ExampleLoader(DataLoader(batch_size=None))`: the loader's dataset yields ready batches, whose examples "
            "have no ids. Expected a loader that forms batches of single examples."
        )
    found = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return found if isinstance(found, int) else None
