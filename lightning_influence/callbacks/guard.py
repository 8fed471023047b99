"""Extra passes through a model in the middle of its training, of which the training notices nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_influence.capture.guard import unchanged


@contextmanager
def pristine(trainer: Trainer | None, pl_module: nn.Module) -> Iterator[None]:
    """Let the body run the model forward and backward at any hook, then put everything back; see `unchanged`.

    Under several ranks every rank has the buffers of rank 0 inside: those that the checkpoint holds, where
    BatchNorm statistics differ between ranks.

    Args:
        trainer: The Trainer that is running, on all of its ranks; None outside of a Trainer.
        pl_module: The model to protect, never the wrapper of a strategy.

    Raises:
        RuntimeError: If a part of the model is compiled and this torch cannot run it eagerly (before 2.6).
    """
    with unchanged(pl_module):
        if trainer is not None and trainer.world_size > 1:
            _take_buffers_of_rank_zero(trainer, pl_module)
        yield


def _take_buffers_of_rank_zero(trainer: Trainer, model: nn.Module) -> None:
    values = trainer.strategy.broadcast([buffer.cpu() for buffer in model.buffers()])
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), values, strict=True):
            buffer.copy_(value)
