"""What training examples do to a target: influence of one example and of a group."""

from __future__ import annotations

from lightning_influence.estimators.adam_dot import AdamDot, load_moments
from lightning_influence.estimators.base import Estimator
from lightning_influence.estimators.candidates import CandidateScores, Scorer, TwoStage
from lightning_influence.estimators.cka import CKA
from lightning_influence.estimators.component_dots import ComponentDots
from lightning_influence.estimators.embedding_similarity import EmbeddingSimilarity
from lightning_influence.estimators.gradient_dot import GradientDot
from lightning_influence.estimators.gradient_matrix import GradientMatrix
from lightning_influence.estimators.group_effects import GroupEffects
from lightning_influence.estimators.group_influence import GroupInfluence
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.estimators.interaction_views import ClassInteractions, Spectrum
from lightning_influence.estimators.interactions import Interactions
from lightning_influence.estimators.less import less_scores
from lightning_influence.estimators.lexical import Lexical
from lightning_influence.estimators.merged import merged
from lightning_influence.estimators.multi_stage import Distance, MultiStageInfluence
from lightning_influence.estimators.projected_dot import ProjectedDot, pair_products
from lightning_influence.estimators.representation import RepresentationSimilarity
from lightning_influence.estimators.row_scores import LengthScore, LossScore
from lightning_influence.estimators.scores import Scores
from lightning_influence.estimators.target_curvature import (
    TargetCurvature,
    TargetMatrix,
    TargetProduct,
    TargetRows,
)
from lightning_influence.estimators.token_scores import TokenScores
from lightning_influence.estimators.top_scores import TopScores
from lightning_influence.estimators.tracin import TracIn
from lightning_influence.estimators.trak import TRAK
from lightning_influence.estimators.whitened import kernel_features, score_features, unseen_squares

__all__ = [
    "CKA",
    "TRAK",
    "AdamDot",
    "CandidateScores",
    "ClassInteractions",
    "ComponentDots",
    "Distance",
    "EmbeddingSimilarity",
    "Estimator",
    "GradientDot",
    "GradientMatrix",
    "GroupEffects",
    "GroupInfluence",
    "InfluenceFunction",
    "Interactions",
    "LengthScore",
    "Lexical",
    "LossScore",
    "MultiStageInfluence",
    "ProjectedDot",
    "RepresentationSimilarity",
    "Scorer",
    "Scores",
    "Spectrum",
    "TargetCurvature",
    "TargetMatrix",
    "TargetProduct",
    "TargetRows",
    "TokenScores",
    "TopScores",
    "TracIn",
    "TwoStage",
    "kernel_features",
    "less_scores",
    "load_moments",
    "merged",
    "pair_products",
    "score_features",
    "unseen_squares",
]
