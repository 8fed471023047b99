"""When two scores of a greedy choice are equal: within what float64 may be off, and then the smaller key wins."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors

ROUNDING = 64 * torch.finfo(torch.float64).eps  # what a product of a few thousand terms may be off


def metric_size(pool: Factors) -> float:
    """‖M‖ (Frobenius), so that |f_jᵀ M f_j| <= ‖M‖ ‖f_j‖²."""
    return 1.0 if pool.metric is None else float(pool.metric.norm())


def magnitudes(values: Tensor, norms: Tensor, size: float) -> Tensor:
    """Size [n] of the numbers that cancel in q_j − b_j: its rounding error is this times `ROUNDING`."""
    return values.abs() + 0.5 * size * norms.square()


def smallest(scores: Tensor, errors: Tensor, keys: Tensor) -> int:
    """Place of the smallest score; of the smallest key among those that may be the smallest within their errors."""
    tied = (scores - errors <= (scores + errors).min()).nonzero().flatten()
    return int(tied[keys[tied].argmin()])
