"""The loss that a module is trained on, where its batches fit no known per-example loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_influence.callbacks.attributes import attributes_kept
from lightning_influence.capture.losses import Batch, BatchLoss
from lightning_influence.errors import UnsupportedLayerError

BATCH_INDEX = 1  # not 0, nor round: at such batches people log pictures
LAYOUT_ERRORS = (ValueError, TypeError, LookupError, AttributeError)


class TrainingStepLoss(BatchLoss):
    """What ``training_step`` of a LightningModule returns for a batch, as a mean (or sum) over its examples.

    The last resort of the recorders, tried out before it is used (see `probe_loss`): a loss that compares examples,
    weighs them by the batch or averages over all of its tokens is refused. It cannot sample labels, so it goes with
    fisher="empirical". ``training_step`` is run in evaluation mode, with a batch index of 1; what it logs is
    dropped, except for what it writes to loggers itself.

    Args:
        batch_reduction: ``"mean"`` or ``"sum"`` over examples.
    """

    name = "training_step"

    def batch_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """[].

        Raises:
            ValueError: If it cannot be run on a batch alone, or fails on this one.
        """
        try:
            return training_step_loss(model, batch)
        except UnsupportedLayerError:
            raise
        except LAYOUT_ERRORS as error:
            raise ValueError(
                f"loss=None: no per-example loss is known for a batch of type {type(batch).__name__}, and "
                f"training_step fails on it ({type(error).__name__}: {error}). Define example_losses(batch) -> [n] on "
                "the module, or pass loss=."
            ) from error


def training_step_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a batch that ``training_step`` returns, [], attached to the graph; to be run under `pristine`.

    Raises:
        ValueError: If the module optimises manually, ``training_step`` takes an iterator, or it returns no loss.
    """
    if not isinstance(model, LightningModule) or not model.automatic_optimization:
        raise ValueError(
            f"training_step of {type(model).__name__}: expected a LightningModule with automatic optimization, whose "
            "training_step returns the loss and takes no step itself."
        )
    with attributes_kept(model):
        return _loss_of(model.training_step(*_arguments(model, batch)))


def _arguments(model: LightningModule, batch: Batch) -> tuple[Any, ...]:
    """Batch, batch_idx and dataloader_idx, as far as ``training_step`` takes them."""
    parameters = inspect.signature(model.training_step).parameters
    if "dataloader_iter" in parameters:
        raise ValueError("training_step takes a dataloader_iter; expected one that takes a batch.")
    kinds = [parameter.kind for parameter in parameters.values()]
    places = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in places)
    indexed = len(places) > 1 or inspect.Parameter.VAR_POSITIONAL in kinds
    return (batch, BATCH_INDEX, 0)[: max(required, 1 + indexed)]


def _loss_of(output: Any) -> Tensor:
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(found, Tensor) or found.numel() != 1:
        shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"type {type(output).__name__}"
        raise ValueError(
            f"training_step returned something of {shape}; expected the loss as one number: a tensor, or a mapping or "
            "an object with 'loss'."
        )
    return found.reshape(())
