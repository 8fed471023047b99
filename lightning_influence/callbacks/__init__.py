"""Recorders for a running Trainer, which notices nothing of them."""

from __future__ import annotations

from lightning_influence.callbacks.base import Recorder
from lightning_influence.callbacks.curvature_recorder import CurvatureRecorder
from lightning_influence.callbacks.gradient_dot_recorder import GradientDotRecorder
from lightning_influence.callbacks.guard import pristine
from lightning_influence.callbacks.less_recorder import LESSRecorder
from lightning_influence.callbacks.recording import Recording
from lightning_influence.callbacks.records import Record, find_records
from lightning_influence.callbacks.training_step_loss import TrainingStepLoss

__all__ = [
    "CurvatureRecorder",
    "GradientDotRecorder",
    "LESSRecorder",
    "Record",
    "Recorder",
    "Recording",
    "TrainingStepLoss",
    "find_records",
    "pristine",
]
