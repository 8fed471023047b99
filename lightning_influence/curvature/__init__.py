"""Second-order information about the loss: accumulated over the training data, applied by solving."""

from __future__ import annotations

from lightning_influence.curvature.adam import AdamMoments, AdamState
from lightning_influence.curvature.arnoldi import Arnoldi
from lightning_influence.curvature.base import Curvature
from lightning_influence.curvature.cg import CG
from lightning_influence.curvature.diagonal import Diagonal
from lightning_influence.curvature.ekfac import EKFAC
from lightning_influence.curvature.exact import Exact
from lightning_influence.curvature.gram import ProjectedGram
from lightning_influence.curvature.identity import Identity
from lightning_influence.curvature.iterative import Convergence, IterativeCurvature
from lightning_influence.curvature.kfac import KFAC
from lightning_influence.curvature.lissa import LiSSA
from lightning_influence.curvature.products import CurvatureProduct, GaussNewtonProduct, HessianProduct

# By class name, so that a store can rebuild what it holds. CG and LiSSA hold nothing that could be stored.
CURVATURES: dict[str, type[Curvature]] = {
    c.__name__: c for c in (Identity, Diagonal, KFAC, EKFAC, ProjectedGram, Arnoldi, Exact)
}

__all__ = [
    "CG",
    "CURVATURES",
    "EKFAC",
    "KFAC",
    "AdamMoments",
    "AdamState",
    "Arnoldi",
    "Convergence",
    "Curvature",
    "CurvatureProduct",
    "Diagonal",
    "Exact",
    "GaussNewtonProduct",
    "HessianProduct",
    "Identity",
    "IterativeCurvature",
    "LiSSA",
    "ProjectedGram",
]
