"""The loss of every single example of a batch, and the same loss with labels drawn from the model itself."""

from __future__ import annotations

from lightning_influence.capture.losses.base import Batch, ExampleLoss
from lightning_influence.capture.losses.batch import BatchLoss
from lightning_influence.capture.losses.classification import ClassificationLoss
from lightning_influence.capture.losses.function import FunctionLoss
from lightning_influence.capture.losses.language_model import LanguageModelLoss
from lightning_influence.capture.losses.module import HasExampleLosses, ModuleLoss
from lightning_influence.capture.losses.regression import RegressionLoss
from lightning_influence.capture.losses.resolve import resolve_loss

__all__ = [
    "Batch",
    "BatchLoss",
    "ClassificationLoss",
    "ExampleLoss",
    "FunctionLoss",
    "HasExampleLosses",
    "LanguageModelLoss",
    "ModuleLoss",
    "RegressionLoss",
    "resolve_loss",
]
