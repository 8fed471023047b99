"""What the training data has to be so that its rows can be chosen: one loader over rows with positions."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.datamodule.warm_up import WarmUp
from lightning_influence.selection import TokenBudget, check_budget
from lightning_influence.selection.budget import Budget, resolve_budget


def checked_pool(loader: Any) -> DataLoader[Any]:
    """The loader as it is.

    Raises:
        ValueError: If it is not one DataLoader over a map-style dataset.
    """
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"`DataSelector(data=...)`: train_dataloader gives a {type(loader).__name__}; expected one DataLoader, "
            "so that every example has one position. Select in each dataset before they are combined."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"`DataSelector(data=...)`: {type(loader.dataset).__name__} is iterable and has no positions, which "
            "recorders, warm-up parts and selections need; expected a map-style dataset with __len__ and __getitem__. "
            "A stream can be served as it is, and a recorder looks at it with `train=StreamedExamples(stream)`; to "
            "choose from it, keep its rows first, such as by `datasets.Dataset.from_generator` or in a list."
        )
    return loader


def pool_size(loader: Any) -> int | None:
    """Number of rows, where it can be known."""
    dataset: Any = loader.dataset if isinstance(loader, DataLoader) else None
    return len(dataset) if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset) else None


def checked_budget(call: str, budget: Budget | None) -> Budget | None:
    """The budget as plain numbers, as far as it can be checked before the pool is known.

    Raises:
        ValueError: If it is none.
    """
    return budget if isinstance(budget, TokenBudget | None) else check_budget(budget, call)


def check_size(loader: Any, budget: Budget | None, warmup: WarmUp | None) -> None:
    """Tell of parts that the pool does not have before the warm-up, and not after it.

    Raises:
        ValueError: If the budget or the warm-up part is larger than the pool, or a share that rounds to nothing.
    """
    size = pool_size(loader)
    if size is None:
        return
    if not isinstance(budget, TokenBudget | None):
        resolve_budget(budget, size, "DataSelector")
    if warmup is not None:
        warmup.check(size)
