"""EK-FAC: K-FAC's eigenbasis with the exact second moments in it (George et al. 2018; [MS] section 3.3)."""

from __future__ import annotations

from lightning_influence.curvature.kronecker import KroneckerCurvature


class EKFAC(KroneckerCurvature):
    """Two passes: covariances for the basis, then the mean squares of the rotated example gradients.

    Never farther from E[g g^T] in Frobenius norm than K-FAC, since Lambda is the best diagonal in the basis.
    Arguments are those of `KroneckerCurvature`, which says how each kind of layer is covered.
    """

    num_passes = 2
