"""Candidate search without gradients: which rows of a pool are worth a closer look for which query."""

from __future__ import annotations

from lightning_influence.filters.base import Filter
from lightning_influence.filters.bm25 import BM25Filter

__all__ = ["BM25Filter", "Filter"]
