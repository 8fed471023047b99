"""Which of my training data matters, and which should I train on next? Answers inside a Lightning run.

Public names, in the order in which data flows: per-example gradients are captured, curvature is fitted, both are
stored, examples and groups are scored, a subset is selected.
"""

from __future__ import annotations

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
from lightning_influence.errors import NotFittedError, StoreError, UnsupportedLayerError
from lightning_influence.estimators import Estimator, GradientDot, InfluenceFunction, Interactions, Scores
from lightning_influence.selection import InteractionGreedy, Random, Selection, SelectionRule, TopK
from lightning_influence.selection.pipeline import select_training_data
from lightning_influence.store import Store

__all__ = [
    "EKFAC",
    "KFAC",
    "ClassificationLoss",
    "Component",
    "Curvature",
    "Estimator",
    "Exact",
    "ExampleLoader",
    "ExampleLoss",
    "FunctionLoss",
    "GradientCapture",
    "GradientDot",
    "Identity",
    "InfluenceFunction",
    "InteractionGreedy",
    "Interactions",
    "LanguageModelLoss",
    "LayerRecord",
    "ModuleLoss",
    "NotFittedError",
    "Random",
    "RegressionLoss",
    "Scores",
    "Selection",
    "SelectionRule",
    "Store",
    "StoreError",
    "TopK",
    "UnsupportedLayerError",
    "find_components",
    "select_training_data",
]
