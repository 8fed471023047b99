"""The ends of a spectrum from products with vectors alone (Lanczos; Golub and Van Loan, section 10.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]


def lanczos(operator: Operator, start: Tensor, steps: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenpairs of a symmetric operator within the Krylov space of a vector.

    Arnoldi's iteration for a symmetric matrix, with every new direction made orthogonal to all before it twice
    (rounding would otherwise bring copies of the leading eigenvectors back). It stops early when the space is
    invariant. One product per step; memory for steps + rank vectors.

    Args:
        operator: [1, P] -> [1, P].
        start: [P], not 0.
        steps: Dimension of the space, at most.
        rank: Pairs to return, at most; None for all.

    Returns:
        Eigenvalues, float64 [k], descending, and orthonormal vectors [k, P].
    """
    basis = start.new_empty(steps, len(start))
    basis[0] = start / start.norm()
    projected = torch.zeros(steps, steps, dtype=torch.float64)
    floor = 100 * torch.finfo(start.dtype).eps
    size = steps
    for k in range(steps):
        image = operator(basis[k : k + 1])[0]
        length = float(image.norm())
        rows = basis[: k + 1]
        for _ in range(2):
            found = rows @ image
            projected[: k + 1, k] += found.double().cpu()
            image = image - found @ rows
        rest = float(image.norm())
        if rest <= floor * length:
            size = k + 1
            break
        if k + 1 < steps:
            basis[k + 1] = image / rest
    block = projected[:size, :size]
    values, inner = torch.linalg.eigh(block.triu() + block.triu(1).mT)
    return values.flip(0)[:rank], inner.flip(1).mT[:rank].to(basis) @ basis[:size]


def spectrum_ends(operator: Operator, start: Tensor, steps: int = 20) -> tuple[float, float]:
    """The smallest and the largest eigenvalue, from inside: neither is exceeded, both are approached quickly."""
    values, _ = lanczos(operator, start, min(steps, len(start)))
    return float(values[-1]), float(values[0])


def random_start(size: int, seed: int, like: Tensor) -> Tensor:
    """A direction for Krylov spaces, the same on every device: [size]."""
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(like)
