"""Per-example gradients out of a running model."""

from __future__ import annotations

from lightning_influence.capture.component import Component, Coverage, find_components, parameter_gradients
from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.capture.finite import omit_nonfinite
from lightning_influence.capture.gradient_capture import GradientCapture
from lightning_influence.capture.losses import (
    ClassificationLoss,
    ExampleLoss,
    FunctionLoss,
    LanguageModelLoss,
    ModuleLoss,
    RegressionLoss,
    resolve_loss,
)
from lightning_influence.capture.record import LayerRecord
from lightning_influence.capture.stream import StreamedExamples

__all__ = [
    "ClassificationLoss",
    "Component",
    "Coverage",
    "ExampleLoader",
    "ExampleLoss",
    "FunctionLoss",
    "GradientCapture",
    "LanguageModelLoss",
    "LayerRecord",
    "ModuleLoss",
    "RegressionLoss",
    "StreamedExamples",
    "find_components",
    "omit_nonfinite",
    "parameter_gradients",
    "resolve_loss",
]
