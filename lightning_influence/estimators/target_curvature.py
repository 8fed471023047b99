"""The curvature H_f of a target function, behind one interface however it is known; applied, never inverted."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class TargetCurvature(ABC):
    """H_f in the coordinates of the gradients: ``V -> H_f V`` for rows V [q, r].

    Attributes:
        label: What it is, such as "empirical Fisher".
    """

    label: str

    @abstractmethod
    def apply(self, vectors: Tensor) -> Tensor:
        """``H_f V``, float64 [q, r] -> float64 [q, r]."""

    def squares(self, vectors: Tensor) -> Tensor:
        """``v^T H_f v`` of each row, float64 [q]."""
        return (vectors * self.apply(vectors)).sum(1) if len(vectors) else vectors.new_zeros(0)


class TargetMatrix(TargetCurvature):
    """A dense H_f.

    Args:
        matrix: [r, r], symmetric; it need not be definite.
        label: What it is.

    Raises:
        ValueError: If it is not a symmetric square matrix of finite numbers.
    """

    def __init__(self, matrix: Tensor, label: str = "given") -> None:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.is_complex():
            raise ValueError(f"`TargetMatrix(matrix)`: expected a real tensor [r, r]. Got shape {list(matrix.shape)}.")
        whole = matrix.detach().double()
        rounding = math.sqrt(torch.finfo(matrix.dtype).eps) if matrix.is_floating_point() else 0.0
        if not whole.isfinite().all() or (whole - whole.mT).abs().max() > rounding * whole.abs().max():
            raise ValueError("`TargetMatrix(matrix)`: expected finite numbers and a symmetric matrix, as a Hessian is.")
        self.matrix, self.label = (whole + whole.mT) / 2, label

    def apply(self, vectors: Tensor) -> Tensor:
        """One matrix product."""
        return vectors @ self.matrix


class TargetRows(TargetCurvature):
    """``H_f = (1/m) Σ_t Σ_s ĝ_ts ĝ_ts^T``, the Fisher of m target examples; of low rank when m is small.

    Args:
        rows: ĝ [m, r], or [m, s, r] with s gradients for each example.
        label: What it is.

    Raises:
        ValueError: If there is no row, or a number is not finite.
    """

    def __init__(self, rows: Tensor, label: str = "Fisher") -> None:
        if rows.dim() not in (2, 3) or 0 in rows.shape or rows.is_complex():
            raise ValueError(
                f"`TargetRows(rows)`: expected a real tensor [m, r] or [m, s, r] with m >= 1. Got {list(rows.shape)}."
            )
        bad = (~rows.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"`TargetRows(rows)`: expected finite numbers; those of examples {bad[:8]} are not.")
        self.scale, self.label = 1 / math.sqrt(len(rows)), label
        self.rows = rows.detach().reshape(-1, rows.shape[-1])

    def apply(self, vectors: Tensor) -> Tensor:
        """Through the m s products of each row."""
        return self.scale * self.products(vectors) @ self.rows.double()

    def squares(self, vectors: Tensor) -> Tensor:
        """Sums of squared products, so that they are never negative."""
        return self.products(vectors).square().sum(1)

    def products(self, vectors: Tensor) -> Tensor:
        """P with ``P P^T = V H_f V^T``, float64 [q, m s]."""
        return self.scale * vectors.double() @ self.rows.double().mT


class TargetProduct(TargetCurvature):
    """H_f known by its products with vectors, such as those of a `CurvatureProduct` or of a fitted curvature.

    Args:
        function: ``V -> H_f V``, [q, r] -> [q, r]; linear and symmetric.
        label: What it is.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], label: str = "given") -> None:
        self.function, self.label = function, label

    def apply(self, vectors: Tensor) -> Tensor:
        """One call for all rows."""
        return self.function(vectors).double()
