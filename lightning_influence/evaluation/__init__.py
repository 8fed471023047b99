"""How well gradients, components and baselines do what is asked of them."""

from __future__ import annotations

from lightning_influence.evaluation.agreement import (
    AgreementLine,
    AgreementReport,
    agreement_gain,
    group_agreement,
)
from lightning_influence.evaluation.comparison import Comparison, compare
from lightning_influence.evaluation.fact_tracing import FactTracingLine, FactTracingReport, evaluate_fact_tracing
from lightning_influence.evaluation.groups import neighbour_groups, random_subsets
from lightning_influence.evaluation.kinds import component_kinds, kind_of
from lightning_influence.evaluation.lds import linear_datamodeling_score
from lightning_influence.evaluation.leave_group_out import GroupChanges, leave_group_out
from lightning_influence.evaluation.retraining import Retraining
from lightning_influence.evaluation.retrieval import RetrievalSetting, candidate_recall, evaluate_retrieval
from lightning_influence.evaluation.retrieval_report import RetrievalLine, RetrievalReport
from lightning_influence.evaluation.selection_curves import SelectionCurves, selection_curves

__all__ = [
    "AgreementLine",
    "AgreementReport",
    "Comparison",
    "FactTracingLine",
    "FactTracingReport",
    "GroupChanges",
    "Retraining",
    "RetrievalLine",
    "RetrievalReport",
    "RetrievalSetting",
    "SelectionCurves",
    "agreement_gain",
    "candidate_recall",
    "compare",
    "component_kinds",
    "evaluate_fact_tracing",
    "evaluate_retrieval",
    "group_agreement",
    "kind_of",
    "leave_group_out",
    "linear_datamodeling_score",
    "neighbour_groups",
    "random_subsets",
    "selection_curves",
]
