"""Second-order information about the loss: accumulated over the training data, applied by solving."""

from __future__ import annotations

from lightning_influence.curvature.base import Curvature
from lightning_influence.curvature.ekfac import EKFAC
from lightning_influence.curvature.exact import Exact
from lightning_influence.curvature.identity import Identity
from lightning_influence.curvature.kfac import KFAC

# By class name, so that a store can rebuild what it holds.
CURVATURES: dict[str, type[Curvature]] = {c.__name__: c for c in (Identity, KFAC, EKFAC, Exact)}

__all__ = ["CURVATURES", "EKFAC", "KFAC", "Curvature", "Exact", "Identity"]
