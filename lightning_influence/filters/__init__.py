"""Candidate search without gradients: which rows of a pool are worth a closer look for which query."""

from __future__ import annotations

from lightning_influence.filters.base import Filter
from lightning_influence.filters.bm25 import BM25Filter
from lightning_influence.filters.knn import KNNFilter
from lightning_influence.filters.tfidf import TfidfFilter

__all__ = ["BM25Filter", "Filter", "KNNFilter", "TfidfFilter"]
