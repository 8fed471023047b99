"""The user's own DataLoader over a part of its dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset, WeightedRandomSampler

from lightning_influence.selection.selection import Selection

_KEPT = (
    "batch_size",
    "num_workers",
    "collate_fn",
    "pin_memory",
    "drop_last",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


def positions_of(selection: Selection) -> list[int]:
    """Its ids: the row numbers of a selection do not count rows that were left out before.

    Raises:
        ValueError: If its ids are names.
    """
    if not all(isinstance(name, int) for name in selection.ids):
        raise ValueError(
            f"`DataSelector.use(Selection(ids={selection.ids[:3]}...))`: expected ids that are positions in the "
            "training data. Pass the positions of these rows as `select(ids=...)`."
        )
    return [int(name) for name in selection.ids]


def subset(dataset: Any, positions: Sequence[int]) -> Any:
    """Some rows of a map-style dataset; a Hugging Face dataset stays one."""
    if hasattr(dataset, "features") and callable(getattr(dataset, "select", None)):
        return dataset.select(list(positions))
    return Subset(dataset, list(positions))


def selected_loader(
    loader: DataLoader[Any], positions: Sequence[int], weights: Sequence[float] | None = None
) -> DataLoader[Any]:
    """A new loader over some rows: batch size, collate function, workers and shuffling are those of the old one.

    The dataset is cut, not the sampler, so that Lightning can put its DistributedSampler on top.

    Args:
        loader: Over a map-style dataset; only read.
        positions: Rows of its dataset, in the order in which they are served without shuffling.
        weights: Of these rows: an epoch is as many draws with replacement, in proportion to them; None for each once.

    Raises:
        ValueError: If the loader is of a kind that cannot be rebuilt, or the rows give no batch.
    """
    shuffle = _shuffles(loader)
    if loader.drop_last and len(positions) < (loader.batch_size or 1):
        raise ValueError(
            f"`selected_loader`: {len(positions)} selected examples give no batch with batch_size={loader.batch_size} "
            "and drop_last=True. Expected a smaller batch size, or drop_last=False."
        )
    settings: dict[str, Any] = {name: getattr(loader, name) for name in _KEPT if hasattr(loader, name)}
    rows = subset(loader.dataset, positions)
    if weights is None:
        return DataLoader(rows, shuffle=shuffle, **settings)
    drawn = WeightedRandomSampler(weights, len(positions), generator=loader.generator)
    return DataLoader(rows, sampler=drawn, **settings)


def _shuffles(loader: DataLoader[Any]) -> bool:
    if type(loader) is not DataLoader:
        raise ValueError(_refusal(f"is a {type(loader).__name__}"))
    if type(loader.batch_sampler) is not BatchSampler:
        kind = "no batches" if loader.batch_sampler is None else f"a {type(loader.batch_sampler).__name__}"
        raise ValueError(_refusal(f"has {kind} as batch_sampler"))
    if type(loader.sampler) is RandomSampler and not loader.sampler.replacement and not loader.sampler._num_samples:
        return True
    if type(loader.sampler) is SequentialSampler:
        return False
    raise ValueError(_refusal(f"has a {type(loader.sampler).__name__} of its own, which speaks of the whole dataset"))


def _refusal(what: str) -> str:
    return (
        f"`selected_loader`: the loader {what}; expected a plain DataLoader with shuffle=True or False. "
        "Pass `loader_fn=`, which makes a DataLoader of the selected part of the dataset."
    )
