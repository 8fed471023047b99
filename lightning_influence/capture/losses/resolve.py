"""Which loss fits a model and its batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_influence.capture.losses.base import Batch, ExampleLoss, labels_of
from lightning_influence.capture.losses.classification import ClassificationLoss
from lightning_influence.capture.losses.function import FunctionLoss
from lightning_influence.capture.losses.language_model import LanguageModelLoss
from lightning_influence.capture.losses.module import HasExampleLosses, ModuleLoss
from lightning_influence.capture.losses.regression import RegressionLoss

UNSHIFTED = ("ForMaskedLM", "ForTokenClassification")  # in the names of classes whose labels stand at their position


def resolve_loss(
    model: nn.Module,
    batch: Batch,
    loss: ExampleLoss | Callable[[nn.Module, Batch], Tensor] | None = None,
    fallback: ExampleLoss | None = None,
) -> ExampleLoss:
    """The per-example loss to use: the one given, the module's own, else the one that fits the batch.

    Args:
        model: The model, asked for ``example_losses`` and for what kind of language model it is, if it is one.
        batch: One batch, on which the choice depends.
        loss: An `ExampleLoss`, a function ``(model, batch) -> [n]``, or None.
        fallback: Taken when no known loss fits the batch.

    Raises:
        ValueError: If no loss fits the batch and there is no fallback, or if two would, or the loss given is none.
    """
    if isinstance(loss, ExampleLoss):
        return loss
    if loss is not None:
        if not callable(loss):
            raise ValueError(f"loss={loss!r}: expected an ExampleLoss, a function (model, batch) -> [n], or None.")
        return FunctionLoss(loss)
    if isinstance(model, HasExampleLosses):
        return ModuleLoss()
    labels = labels_of(batch)
    if isinstance(labels, Tensor) and labels.is_floating_point():
        if bool(((labels == 0) | (labels == 1)).all()):
            raise ValueError(
                "loss=None: all labels of the batch are 0. or 1., which could be two classes or a regression. "
                "Pass loss=ClassificationLoss() or loss=RegressionLoss(), or define example_losses(batch) -> [n]."
            )
        return RegressionLoss()
    if isinstance(labels, Tensor) and labels.dim() == 2 and isinstance(batch, Mapping):
        return _language_model_loss(model)
    if isinstance(labels, Tensor) and labels.dim() == 1:
        return ClassificationLoss()
    if fallback is not None:
        return fallback
    raise ValueError(
        f"loss=None: no per-example loss is known for a batch of type {type(batch).__name__}. Expected a mapping "
        "with 'labels', or (x, y). Define example_losses(batch) -> [n] on the module, or pass loss=, for example "
        "LanguageModelLoss(), ClassificationLoss(), RegressionLoss() or a function (model, batch) -> [n]."
    )


def _language_model_loss(model: nn.Module) -> LanguageModelLoss:
    """Causal unless the model, or what it wraps, says otherwise."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    if next((config.is_encoder_decoder for config in configs if hasattr(config, "is_encoder_decoder")), False):
        return LanguageModelLoss(encoder_decoder=True)
    names = [type(module).__name__ for module in model.modules()]
    return LanguageModelLoss(shift=not any(mark in name for name in names for mark in UNSHIFTED))
