"""The examples whose loss shall fall: given ones, or the validation data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.datamodule.wrapper import overrides


def checked_targets(targets: Any) -> Any:
    """As they are, if they have rows with positions.

    Raises:
        ValueError: If not.
    """
    try:
        for data in targets.values() if isinstance(targets, Mapping) else (targets,):
            ExampleLoader(data)
    except ValueError as error:
        raise ValueError(f"`DataSelector(targets={type(targets).__name__})`: {error}") from error
    return targets


def target_data(targets: Any, pool: DataLoader[Any], inner: Any) -> Any:
    """Targets in batches: as they come in a loader, and else as the pool's do.

    Args:
        targets: DataLoader or dataset, or several by name; None for the validation data.
        pool: Whose batch size and collate function a dataset is put into batches with.
        inner: The datamodule that has the validation data.

    Raises:
        ValueError: If there is no single loader of validation data to take them from.
    """
    if isinstance(targets, Mapping):
        return {name: target_data(data, pool, inner) for name, data in targets.items()}
    if isinstance(targets, DataLoader):
        return targets
    if targets is not None:
        like = ExampleLoader(pool)
        return ExampleLoader(targets, like.batch_size, like.collate_fn)
    loader = inner.val_dataloader() if overrides(inner, "val_dataloader") else None
    if isinstance(loader, list | tuple) and len(loader) == 1:
        loader = loader[0]
    if not isinstance(loader, DataLoader):
        raise ValueError(
            "`DataSelector(targets=None)`: the data has no single validation loader to take the targets from. "
            "Expected a DataLoader or dataset of the examples whose loss shall fall, or several by name."
        )
    return loader
