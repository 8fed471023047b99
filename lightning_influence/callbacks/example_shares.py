"""Queries and training examples of a recording: read as the training data is, shared out over ranks, put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_influence.callbacks.preconditions import training_data
from lightning_influence.callbacks.recording import Recording
from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.estimators.scores import Scores


def read_as_training(
    call: str, trainer: Trainer, data: Any, train: Any, batch_size: int | None, what: str
) -> ExampleLoader:
    """Examples of data; a dataset without a loader is read with the training data's collate function and batch size.

    Args:
        call: How the caller's code reads, for the error text.
        trainer: The running Trainer.
        data: Map-style dataset or loader.
        train: The training data where the user gave some, or None.
        batch_size: Examples per batch; None takes the loader's.
        what: What to call the examples in an error.
    """
    like = train if isinstance(train, DataLoader | ExampleLoader) else None
    if isinstance(data, DataLoader | ExampleLoader):
        return ExampleLoader(data, batch_size, what=what)
    try:
        training = ExampleLoader(training_data(call, trainer) if like is None else like)
    except (MisconfigurationException, ValueError):  # the fit trains on something that has no positions
        return ExampleLoader(data, batch_size, what=what)
    return ExampleLoader(data, batch_size or training.batch_size, training.collate_fn, what=what)


def own_part(recording: Recording, examples: ExampleLoader) -> ExampleLoader | None:
    """This rank's part of some examples; None where there are more ranks than examples, and this is one of them."""
    ids = examples.ids[recording.trainer.global_rank :: recording.trainer.world_size]
    return ExampleLoader(examples, indices=ids) if ids else None


def joined_columns(parts: Sequence[Scores | None], ids: Sequence[int]) -> Scores:
    """The ranks' columns, in the order of the ids."""
    found = [part for part in parts if part is not None]
    place = {name: k for k, name in enumerate(name for part in found for name in part.train_ids)}
    values = torch.cat([part.values for part in found], dim=-1)[..., [place[name] for name in ids]]
    return replace(found[0], values=values, train_ids=tuple(ids))


def weights_label(recording: Recording) -> str:
    """Where the recorded weights are."""
    return recording.checkpoint or f"step={recording.step}"
