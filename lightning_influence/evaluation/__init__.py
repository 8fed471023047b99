"""How well gradients, components and baselines do what is asked of them."""

from __future__ import annotations

from lightning_influence.evaluation.fact_tracing import FactTracingLine, FactTracingReport, evaluate_fact_tracing
from lightning_influence.evaluation.kinds import component_kinds, kind_of
from lightning_influence.evaluation.retrieval import RetrievalSetting, candidate_recall, evaluate_retrieval
from lightning_influence.evaluation.retrieval_report import RetrievalLine, RetrievalReport

__all__ = [
    "FactTracingLine",
    "FactTracingReport",
    "RetrievalLine",
    "RetrievalReport",
    "RetrievalSetting",
    "candidate_recall",
    "component_kinds",
    "evaluate_fact_tracing",
    "evaluate_retrieval",
    "kind_of",
]
