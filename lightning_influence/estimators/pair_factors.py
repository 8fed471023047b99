"""Pair terms of group estimates as K = F M F^T, in the smallest form."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.estimators.target_curvature import TargetCurvature, TargetRows


def pair_factors(
    shifts: Tensor, target: TargetCurvature | None, vectors: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """F and M, None for the identity, of K_ij = u_i^T H_f u_j + v_i^T u_j + v_j^T u_i, float64.

    Args:
        shifts: u [n, r], float64.
        target: H_f; None without interactions.
        vectors: v [n, r], float64; None without the second order.

    Returns:
        F with scores when H_f, alone, is a Fisher of target examples; n columns, the identity with M = K, where there
        would be more; else the parts side by side.
    """
    if isinstance(target, TargetRows) and vectors is None:
        return target.products(shifts), None
    n, r = shifts.shape
    if n < r * (1 if vectors is None else 2):
        pairs = shifts.new_zeros(n, n) if target is None else target.apply(shifts) @ shifts.mT
        if vectors is not None:
            crossed = vectors @ shifts.mT
            pairs += crossed + crossed.mT
        return torch.eye(n, dtype=shifts.dtype, device=shifts.device), pairs
    unit = torch.eye(r, dtype=shifts.dtype, device=shifts.device)
    curved = torch.zeros_like(unit) if target is None else target.apply(unit)
    if vectors is None:
        return shifts, curved
    swap = torch.cat([torch.cat([torch.zeros_like(unit), unit], dim=1), torch.cat([unit, curved], dim=1)])
    return torch.cat([vectors, shifts], dim=1), swap
