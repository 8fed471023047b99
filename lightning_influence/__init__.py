"""Which of my training data matters, and which should I train on next? Answers inside a Lightning run.

Public names, in the order in which data flows: per-example gradients are captured, curvature is fitted, both are
stored, examples and groups are scored, a subset is selected.
"""

from __future__ import annotations

from lightning_influence.callbacks import CurvatureRecorder, GradientDotRecorder, Recorder, find_records
from lightning_influence.capture import (
    ClassificationLoss,
    Component,
    ExampleLoader,
    ExampleLoss,
    FunctionLoss,
    GradientCapture,
    LanguageModelLoss,
    LayerRecord,
    ModuleLoss,
    RegressionLoss,
    find_components,
)
from lightning_influence.curvature import EKFAC, KFAC, Curvature, Exact, Identity
from lightning_influence.datamodule import DataSelector
from lightning_influence.errors import NotFittedError, StoreError, UnsupportedLayerError
from lightning_influence.estimators import Estimator, GradientDot, InfluenceFunction, Interactions, Scores
from lightning_influence.filters import BM25Filter, Filter
from lightning_influence.metrics import ClassEntropy, class_entropy
from lightning_influence.selection import InteractionGreedy, Random, Selection, SelectionRule, TopK
from lightning_influence.selection.pipeline import select_training_data
from lightning_influence.store import Store

__all__ = [  # noqa: RUF022  in the order in which data flows
    "Component",
    "find_components",
    "GradientCapture",
    "LayerRecord",
    "ExampleLoader",
    "ExampleLoss",
    "LanguageModelLoss",
    "ClassificationLoss",
    "RegressionLoss",
    "ModuleLoss",
    "FunctionLoss",
    "Filter",
    "BM25Filter",
    "ClassEntropy",
    "class_entropy",
    "Curvature",
    "Identity",
    "KFAC",
    "EKFAC",
    "Exact",
    "Store",
    "Estimator",
    "Scores",
    "GradientDot",
    "InfluenceFunction",
    "Interactions",
    "Selection",
    "SelectionRule",
    "InteractionGreedy",
    "TopK",
    "Random",
    "select_training_data",
    "Recorder",
    "GradientDotRecorder",
    "CurvatureRecorder",
    "find_records",
    "DataSelector",
    "UnsupportedLayerError",
    "NotFittedError",
    "StoreError",
]
