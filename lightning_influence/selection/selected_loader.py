"""The user's own DataLoader over a part of its dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset, WeightedRandomSampler

from lightning_influence.selection.selection import Selection

_KEPT = (
    "num_workers",
    "collate_fn",
    "pin_memory",
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
    batches = _batches(loader)  # a loader made of them has no batch_size and no shuffling of its own
    if batches.drop_last and len(positions) < batches.batch_size:
        raise ValueError(
            f"`selected_loader`: {len(positions)} selected examples give no batch with batch_size={batches.batch_size} "
            "and drop_last=True. Expected a smaller batch size, or drop_last=False."
        )
    settings: dict[str, Any] = {name: getattr(loader, name) for name in _KEPT if hasattr(loader, name)}
    settings |= {"batch_size": batches.batch_size, "drop_last": batches.drop_last}
    rows, generator = subset(loader.dataset, positions), getattr(batches.sampler, "generator", loader.generator)
    if weights is not None:
        return DataLoader(rows, sampler=WeightedRandomSampler(weights, len(positions), generator=generator), **settings)
    if isinstance(batches.sampler, RandomSampler):
        return DataLoader(rows, sampler=RandomSampler(rows, generator=generator), **settings)
    return DataLoader(rows, **settings)


def _batches(loader: DataLoader[Any]) -> BatchSampler:
    """What puts its rows in batches, of all of them once in an epoch."""
    if type(loader) is not DataLoader:
        raise ValueError(_refusal(f"is a {type(loader).__name__}"))
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        kind = "no batches" if batches is None else f"a {type(batches).__name__}"
        raise ValueError(_refusal(f"has {kind} as batch_sampler"))
    sampler = batches.sampler
    whole = type(sampler) in (SequentialSampler, RandomSampler) and len(sampler) == len(loader.dataset)  # type: ignore[arg-type]
    if not whole or getattr(sampler, "replacement", False) or getattr(sampler, "_num_samples", None):
        raise ValueError(_refusal(f"has a {type(sampler).__name__} of its own, which speaks of the whole dataset"))
    return batches


def _refusal(what: str) -> str:
    return (
        f"`selected_loader`: the loader {what}; expected a plain DataLoader with shuffle=True or False. "
        "Pass `loader_fn=`, which makes a DataLoader of the selected part of the dataset."
    )
