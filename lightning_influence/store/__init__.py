"""Recordings on disk: one directory that checks itself and that a later process can open."""

from __future__ import annotations

from lightning_influence.store.fingerprint import model_fingerprint
from lightning_influence.store.rows import Rows, RowWriter
from lightning_influence.store.scores import StoredScores
from lightning_influence.store.store import Store

__all__ = ["RowWriter", "Rows", "Store", "StoredScores", "model_fingerprint"]
