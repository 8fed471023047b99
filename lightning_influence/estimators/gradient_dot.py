"""Gradient similarity: dot products and cosines, component by component ([SP] section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_influence.estimators.base import Estimator


class GradientDot(Estimator):
    """``sum over components of <g_query, g_train>``; with ``normalise=True`` the cosine of the whole gradients.

    The first-order effect of one small gradient step on the training example: score > 0 lowers the query's
    loss. Arguments are those of `Estimator`.
    """

    formula = "<g_q, g_i>"

    def transform(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As they are."""
        return dict(gradients)
