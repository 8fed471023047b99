"""The diagonal of the Fisher information ([MS] section 3, the simplest of its approximations)."""

from __future__ import annotations

from lightning_influence.capture import Component, LayerRecord
from lightning_influence.curvature.blocks import DiagonalBlock
from lightning_influence.curvature.blockwise import BlockwiseCurvature


class Diagonal(BlockwiseCurvature):
    """``solve(V) = V / (E[g ⊙ g] + damping)``, g the gradient of one whole example: squared first, then averaged.

    One pass over the data and one number per parameter. Unlike K-FAC it takes parameters for independent, and unlike
    Adam's second moments it averages squares of examples, not of batch means.
    Arguments are the first four of `EKFAC`.
    """

    num_passes = 1

    def block(self, component: Component, record: LayerRecord) -> DiagonalBlock:
        """Squares of the example gradients."""
        return DiagonalBlock()
