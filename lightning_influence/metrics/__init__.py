"""Numbers that tell a good selection or a good score from a bad one."""

from __future__ import annotations

from lightning_influence.metrics.class_entropy import ClassEntropy, class_entropy
from lightning_influence.metrics.rank_agreement import RankAgreement, kendall, spearman
from lightning_influence.metrics.retrieval import (
    RetrievalAccuracy,
    mean_reciprocal_rank,
    pessimistic_inputs,
    recall_at_k,
    retrieval_accuracy,
    retrieval_ranks,
)

__all__ = [
    "ClassEntropy",
    "RankAgreement",
    "RetrievalAccuracy",
    "class_entropy",
    "kendall",
    "mean_reciprocal_rank",
    "pessimistic_inputs",
    "recall_at_k",
    "retrieval_accuracy",
    "retrieval_ranks",
    "spearman",
]
