"""What a recorder needs from a Trainer, told before anything runs."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_influence.capture.losses import HasExampleLosses


def check_loss(call: str, pl_module: LightningModule, loss: object) -> None:
    """Refuse to guess what a manually optimised module minimises.

    Raises:
        MisconfigurationException: If it optimises manually and no loss is given.
    """
    if pl_module.automatic_optimization or loss is not None or isinstance(pl_module, HasExampleLosses):
        return
    raise MisconfigurationException(
        f"`{call}`: {type(pl_module).__name__} optimises manually, so what it minimises cannot be guessed. "
        "Expected `loss=`, or `example_losses(batch) -> [n]` on the module."
    )


def check_strategy(call: str, trainer: Trainer) -> None:
    """Refuse strategies that shard the parameters.

    Raises:
        MisconfigurationException: For FSDP, DeepSpeed and model parallelism.
    """
    if trainer.strategy.restore_checkpoint_after_setup:  # the strategies that load shards say so
        raise MisconfigurationException(
            f"`{call}`: {type(trainer.strategy).__name__} shards the parameters, and per-example gradients need "
            "whole layers. Expected one device or DDP; record from the checkpoint on one device instead."
        )


def check_savers(call: str, trainer: Trainer) -> None:
    """Warn when checkpoints are waited for that never come."""
    if not trainer.checkpoint_callbacks:
        rank_zero_warn(
            f"`{call}`: the Trainer has no checkpoint callback, so nothing is recorded before "
            "`trainer.save_checkpoint` is called. Expected a ModelCheckpoint, or when='fit_end'."
        )


def check_averaging(call: str, trainer: Trainer) -> None:
    """Warn when checkpoints hold other weights than the live ones, which are recorded."""
    others: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averaging = [c for c in others if _averages(c)]
    if averaging:
        rank_zero_warn(
            f"`{call}`: {type(averaging[0]).__name__} saves averaged weights, while the live ones are recorded. "
            "Expected when='fit_end' with the recorder listed after it, which then sees the averaged weights."
        )


def training_data(call: str, trainer: Trainer) -> DataLoader[Any]:
    """The loader that holds the training examples, to be read for its dataset and never iterated.

    Iterating it would reset the loop's own iterator (with persistent workers the epoch ends early). A
    `DataSelector` gives its whole pool, whatever is selected.

    Raises:
        MisconfigurationException: If the fit trains on something other than one DataLoader.
    """
    pool = getattr(getattr(trainer, "datamodule", None), "pool_dataloader", None)
    loader = trainer.train_dataloader if pool is None else pool()
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(
            f"`{call}`: the fit trains on a {type(loader).__name__}; expected one DataLoader, so that every example "
            "has one number. Pass the DataLoader or dataset whose examples shall be looked at: `train=...`."
        )
    return loader


def _averages(callback: Callback) -> bool:
    return any(cls.__name__ == "WeightAveraging" for cls in type(callback).__mro__)
