"""Random projections of per-example gradients to few dimensions that keep inner products on average."""

from __future__ import annotations

from lightning_influence.projections.base import Projection
from lightning_influence.projections.dense import TrakProjection
from lightning_influence.projections.factored import FactoredProjection
from lightning_influence.projections.logra import LoGra

# By class name, so that what was projected can be labelled and the map be drawn again.
PROJECTIONS: dict[str, type[Projection]] = {c.__name__: c for c in (FactoredProjection, LoGra, TrakProjection)}

__all__ = ["PROJECTIONS", "FactoredProjection", "LoGra", "Projection", "TrakProjection"]
