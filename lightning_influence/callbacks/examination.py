"""Whether the losses that are recorded are those of single examples, and of what the user trains on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_influence.callbacks.recording import Recording
from lightning_influence.callbacks.training_step_loss import TrainingStepLoss, training_step_loss
from lightning_influence.capture.component import find_components
from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.capture.gradient_capture import GradientCapture
from lightning_influence.capture.losses import Batch, BatchLoss, ExampleLoss, RegressionLoss, resolve_loss
from lightning_influence.capture.losses.base import labels_of
from lightning_influence.capture.probe import LossProbe, probe_loss

CLOSE = {torch.float64: 1e-3, torch.float32: 1e-3}  # relative; coarser formats 1e-2


@dataclass(frozen=True)
class Examination:
    """What one batch of the training data told.

    Attributes:
        loss: The loss to record with.
        trained_reduction: What ``training_step`` makes of the examples' losses: ``"mean over examples"``, ``"sum"``,
            ``"mean over tokens"``, ``"mean squared error (...)"``, none of these, or why this is not known.
    """

    loss: ExampleLoss
    trained_reduction: str


def resolve(recording: Recording, examples: ExampleLoader, loss: Any = None) -> ExampleLoss:
    """The loss given, the module's own, one that fits the first batch, or what ``training_step`` returns.

    Raises:
        ValueError: If two losses fit the batch.
    """
    _, batch = next(iter(examples))
    return resolve_loss(recording.model, batch, loss, fallback=TrainingStepLoss())


def examine(recording: Recording, examples: ExampleLoader, loss: ExampleLoss, components: Any = None) -> Examination:
    """Look at the first batch: do its examples have losses of their own, and is it these that are trained on?

    Args:
        recording: A recording under way, with the model protected.
        examples: Training examples as ``training_step`` gets them.
        loss: Their loss.
        components: Those of interest.

    Raises:
        ValueError: If the loss of an example depends on the rest of its batch.
        UnsupportedLayerError: If components have no per-example gradient.
    """
    ids, batch = next(iter(examples))
    with GradientCapture(recording.model, find_components(recording.model, components)) as capture:
        found = probe_loss(capture, batch, recording.in_precision(loss), ids, examples.what)
    loss = _settled(recording, found, loss, alone=examples.batch_size == 1)
    return Examination(loss, _trained_reduction(recording, batch, loss))


def _settled(recording: Recording, found: LossProbe, loss: ExampleLoss, alone: bool) -> ExampleLoss:
    """The loss to record with, if what was found of it allows for one."""
    whole = isinstance(loss, BatchLoss)
    if found.kind == "same" or (alone and found.kind == "unknown"):
        return loss
    if isinstance(loss, BatchLoss) and found.kind == "times n":
        rank_zero_info(f"{recording.name}: {loss.name} returns the sum of its examples' losses, and is taken so.")
        return loss.summed()
    if found.kind == "unknown" or (found.kind == "fails alone" and not whole):
        rank_zero_warn(f"{recording.name}: {found}, so it is taken on trust that the loss is {loss.reduction}.")
        return loss
    raise ValueError(
        f"{recording.name}, loss {loss.reduction}: {found}. Expected the loss of each example on its own, whatever "
        "else is in the batch: define example_losses(batch) -> [n] on the module, or pass loss=."
    )


def _trained_reduction(recording: Recording, batch: Batch, loss: ExampleLoss) -> str:
    if isinstance(loss, TrainingStepLoss):
        return "sum" if loss.batch_reduction == "sum" else "mean over examples"
    try:
        with recording.trainer.precision_plugin.forward_context():
            trained = training_step_loss(recording.model, batch).detach()
        with torch.no_grad():
            losses = recording.in_precision(loss).losses(recording.model, batch)
        targets = loss.supervised(batch).to(losses)
    except Exception as error:
        return f"not compared: {type(error).__name__}: {error}"
    ways = _reductions(losses, targets, loss.reduction)
    if type(loss) is RegressionLoss:  # half the squared error of d outputs, summed over them
        d = labels_of(batch)[0].numel()
        ways[f"mean squared error ({2 / d:.4g} x mean over examples)"] = 2 * losses.mean() / d
    room = CLOSE.get(trained.dtype, 1e-2)
    for name, value in ways.items():
        if torch.isclose(value, trained.to(value), rtol=room, atol=1e-6):
            return name
    mean, total = float(ways["mean over examples"]), float(ways["sum"])
    rank_zero_warn(
        f"{recording.name}: for the same batch training_step returns {float(trained):.6g}, while the losses recorded "
        f"({loss.reduction}) have mean {mean:.6g} and sum {total:.6g}. So influence is that on another loss than the "
        "one trained on, which has other terms, weights or a scale (regularisation, label smoothing). Unless this is "
        "on purpose, define example_losses(batch) -> [n] on the module, or pass loss=."
    )
    ratio = float(ways["mean over examples"] / trained)
    return f"none of these (mean over examples / training_step = {ratio:.4g})"


def _reductions(losses: Tensor, targets: Tensor, reduction: str) -> dict[str, Tensor]:
    """The usual ways to make one number of the examples' losses."""
    tokens = losses * targets if reduction == "mean" else losses  # of a sequence: a mean over its tokens, or their sum
    return {
        "mean over examples": losses.mean(),
        "sum": losses.sum(),
        "mean over tokens": tokens.sum() / targets.sum().clamp_min(1),
    }
