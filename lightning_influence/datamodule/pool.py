"""What the training data has to be so that its rows can be chosen: one loader over rows with positions."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.datamodule.warm_up import WarmUp
from lightning_influence.estimators.factors import Factors
from lightning_influence.selection import Constraints, TokenBudget, check_budget
from lightning_influence.selection.budget import Budget, resolve_budget

COMBINED = (
    "To choose from all of them, put their datasets into one, `ConcatDataset([...])`, behind one DataLoader. To choose "
    "from one of them, give that one alone to a DataSelector, and combine its `train_dataloader()` with the others in "
    "a datamodule around it."
)


def several(loaders: Any) -> str:
    """What was given where one DataLoader was expected, with the names of its parts where it has names.

    >>> several({"cats": [], "dogs": []})
    "a dict ('cats', 'dogs')"
    """
    parts = getattr(loaders, "iterables", loaders)  # of a CombinedLoader
    names = f" ({', '.join(repr(name) for name in list(parts)[:5])})" if isinstance(parts, Mapping) and parts else ""
    return f"a {type(loaders).__name__}{names}"


def checked_pool(loader: Any) -> DataLoader[Any]:
    """The loader as it is.

    Raises:
        ValueError: If it is not one DataLoader over a map-style dataset.
    """
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"`DataSelector(data=...)`: train_dataloader gives {several(loader)}; expected one DataLoader over a "
            f"map-style dataset, so that every example has one position. {COMBINED}"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"`DataSelector(data=...)`: {type(loader.dataset).__name__} is iterable and has no positions, which "
            "recorders, warm-up parts and selections need; expected a map-style dataset with __len__ and __getitem__. "
            "A stream can be served as it is, and a recorder looks at it with `train=StreamedExamples(stream)`; to "
            "choose from it, keep its rows first, such as by `datasets.Dataset.from_generator` or in a list."
        )
    return loader


def check_single(argument: str, data: Any) -> None:
    """Refuse several loaders or datasets where one was expected.

    Raises:
        ValueError: If they are a mapping, a CombinedLoader, or loaders in a list.
    """
    parts = getattr(data, "iterables", data)  # of a CombinedLoader
    inside = list(parts.values()) if isinstance(parts, Mapping) else parts if isinstance(parts, list | tuple) else []
    loaders = any(isinstance(part, DataLoader) for part in inside)
    if loaders or isinstance(parts, Mapping):
        fix = COMBINED if loaders else "Of a dictionary of datasets, such as splits, pass one."
        raise ValueError(
            f"`DataSelector({argument}=...)`: got {several(data)}; expected one DataLoader or dataset. {fix}"
        )


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
        if budget is not None:
            _warn_of_no_pool(loader)
        return
    if not isinstance(budget, TokenBudget | None):
        resolve_budget(budget, size, "DataSelector")
        if constraints is not None:
            rows = Factors(torch.zeros(size, dtype=torch.float64), None, None, range(size))
            replace(constraints, duplicates="allow", duplicate_keys=None).admission("DataSelector", rows, budget)
    if warmup is not None:
        warmup.check(size)


def _warn_of_no_pool(loader: Any) -> None:
    try:
        checked_pool(loader)
    except ValueError as error:
        rank_zero_warn(f"{error} A fit is served it as it is, but `select(model)` will refuse it.")
