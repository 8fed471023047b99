"""What the training data has to be so that its rows can be chosen: one loader over rows with positions."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.datamodule.warm_up import WarmUp
from lightning_influence.estimators.factors import Factors
from lightning_influence.selection import Constraints, TokenBudget, check_budget
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


def check_size(
    loader: Any, budget: Budget | None, warmup: WarmUp | None, constraints: Constraints | None = None
) -> None:
    """Tell of what the pool cannot give before the warm-up, and not after it.

    Which rows are equal, and how many tokens they have, is not known yet: what depends on these is told by `select`.

    Raises:
        ValueError: If the budget or the warm-up part is larger than the pool, or a share that rounds to nothing; if no
            selection of so many rows can meet the constraints.
    """
    size = pool_size(loader)
    if size is None:
        return
    if not isinstance(budget, TokenBudget | None):
        resolve_budget(budget, size, "DataSelector")
        if constraints is not None:
            rows = Factors(torch.zeros(size, dtype=torch.float64), None, None, range(size))
            replace(constraints, duplicates="allow", duplicate_keys=None).admission("DataSelector", rows, budget)
    if warmup is not None:
        warmup.check(size)
