"""K-FAC: Kronecker-factored Fisher information (Martens and Grosse 2015; [MS] section 3.3)."""

from __future__ import annotations

from lightning_influence.curvature.kronecker import KroneckerCurvature


class KFAC(KroneckerCurvature):
    """Layer by layer ``S ⊗ A`` times the mean number of positions of an example; one pass over the data.

    Arguments are those of `EKFAC`, which says how each kind of layer is covered.
    """

    num_passes = 1
