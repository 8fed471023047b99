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
from lightning_influence.estimators import (
    ComponentDots,
    Estimator,
    GradientDot,
    InfluenceFunction,
    Interactions,
    ProjectedDot,
    Scores,
    TracIn,
    pair_products,
)
from lightning_influence.evaluation import (
    RetrievalReport,
    RetrievalSetting,
    candidate_recall,
    evaluate_retrieval,
)
from lightning_influence.filters import BM25Filter, Filter, KNNFilter, TfidfFilter
from lightning_influence.metrics import (
    ClassEntropy,
    RetrievalAccuracy,
    class_entropy,
    mean_reciprocal_rank,
    recall_at_k,
    retrieval_accuracy,
    retrieval_ranks,
)
from lightning_influence.projections import FactoredProjection, LoGra, Projection, TrakProjection
from lightning_influence.report import ComponentImportance, component_importance
from lightning_influence.selection import (
    ComponentPairs,
    ComponentPath,
    ComponentSelection,
    InteractionGreedy,
    Random,
    Selection,
    SelectionRule,
    TopK,
    cross_validate_components,
    greedy_components,
    single_component_scores,
)
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
    "TfidfFilter",
    "KNNFilter",
    "ClassEntropy",
    "class_entropy",
    "RetrievalAccuracy",
    "retrieval_accuracy",
    "retrieval_ranks",
    "mean_reciprocal_rank",
    "recall_at_k",
    "Projection",
    "FactoredProjection",
    "LoGra",
    "TrakProjection",
    "Curvature",
    "Identity",
    "KFAC",
    "EKFAC",
    "Exact",
    "Store",
    "Estimator",
    "Scores",
    "GradientDot",
    "ComponentDots",
    "ProjectedDot",
    "pair_products",
    "TracIn",
    "InfluenceFunction",
    "Interactions",
    "Selection",
    "SelectionRule",
    "InteractionGreedy",
    "TopK",
    "Random",
    "select_training_data",
    "ComponentPairs",
    "greedy_components",
    "single_component_scores",
    "cross_validate_components",
    "ComponentPath",
    "ComponentSelection",
    "evaluate_retrieval",
    "RetrievalSetting",
    "RetrievalReport",
    "candidate_recall",
    "component_importance",
    "ComponentImportance",
    "Recorder",
    "GradientDotRecorder",
    "CurvatureRecorder",
    "find_records",
    "DataSelector",
    "UnsupportedLayerError",
    "NotFittedError",
    "StoreError",
]
