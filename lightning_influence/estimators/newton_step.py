"""One Newton step on the objective without a group, or with it twice, from inner products of the group's gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.curvature.base import symmetric


class IndefiniteError(ValueError):
    """The objective without the group has no positive definite curvature.

    Attributes:
        largest: Largest eigenvalue of ``w Ĝ H⁻¹ Ĝ^T``, at least 1.
        damping: What, added to H, makes ``H - w Ĝ^T Ĝ`` positive definite for certain.
    """

    def __init__(self, largest: float, damping: float) -> None:
        super().__init__(f"the largest eigenvalue of Ĝ H⁻¹ Ĝ^T / n is {largest:.4g}, expected less than 1")
        self.largest, self.damping = largest, damping


def newton_shift(first: Tensor, rows: Tensor, row_shifts: Tensor, weight: float, sign: float) -> Tensor:
    """``Δ = w (H - sign w H_S)⁻¹ Σ g`` with H_S = Ĝ^T Ĝ, by Woodbury from H⁻¹ alone: float64 [r].

    ``Δ = U + sign (Ĝ H⁻¹)^T (I/w - sign Ĝ H⁻¹ Ĝ^T)⁻¹ Ĝ U``; the matrix that is inverted has as many rows as Ĝ, but
    never more than r.

    Args:
        first: ``U = w H⁻¹ Σ g``, [r].
        rows: Ĝ, [k, r].
        row_shifts: ``Ĝ H⁻¹``, [k, r].
        weight: w.
        sign: 1 for a group that is removed, -1 for one that is added.

    Raises:
        IndefiniteError: If ``H - w H_S`` is not positive definite.
    """
    if not len(rows):
        return first
    rows, row_shifts = _fewest(rows, row_shifts)
    inner = symmetric(rows @ row_shifts.mT)
    matrix = torch.eye(len(inner), dtype=inner.dtype, device=inner.device) / weight - sign * inner
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        largest = weight * float(torch.linalg.eigvalsh(inner)[-1])
        size = weight * float(torch.linalg.eigvalsh(symmetric(rows @ rows.mT))[-1])
        # x^T H x >= x^T w H_S x / largest and x^T w H_S x <= size |x|^2 bound what H lacks against w H_S.
        raise IndefiniteError(largest, (1 - 1 / max(largest, 1.0)) * size)
    inside = torch.cholesky_solve((rows @ first)[:, None], factor)[:, 0]
    return first + sign * row_shifts.mT @ inside


def curvature_term(gradient: Tensor, first: Tensor, rows: Tensor, row_shifts: Tensor, weight: float) -> Tensor:
    """``w ∇f^T H⁻¹ H_S U``: the second order of the minimiser in the weight of the group (Basu et al. 2020)."""
    return weight * (row_shifts @ gradient) @ (rows @ first)


def curvature_vectors(gradient: Tensor, rows: Tensor, row_shifts: Tensor, weight: float) -> Tensor:
    """v_i = w H_i H⁻¹ ∇f of single examples, so that ``Σ_{i∈S} v_i^T U`` is `curvature_term`: float64 [n, r].

    Args:
        gradient: ∇f [r], float64.
        rows: ĝ_is [n, s, r] with H_i = Σ_s ĝ_is ĝ_is^T.
        row_shifts: H⁻¹ ĝ_is [n, s, r].
        weight: w.
    """
    found: Tensor = torch.einsum("ns,nsr->nr", weight * (row_shifts.double() @ gradient), rows.double())
    return found


def _fewest(rows: Tensor, row_shifts: Tensor) -> tuple[Tensor, Tensor]:
    """At most r rows with the same ``Ĝ^T Ĝ``: with Ĝ = Q T it is T, and ``T H⁻¹ = Q^T Ĝ H⁻¹``."""
    if len(rows) <= rows.shape[1]:
        return rows, row_shifts
    basis, triangle = torch.linalg.qr(rows)
    return triangle, basis.mT @ row_shifts
