"""Features of a pool and a target whose inner products are influences, whatever they are made of.

φ_i = (G + damping)^{-1/2} g_i are the features of the Newton step ([IA] section 3.1 gives the interactions of the same
gradients): ⟨φ_i, φ_j⟩ = g_iᵀ (G + damping)⁻¹ g_j. `InfluenceFunction.features` takes them from gradients, whole or
projected; here they come from scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 4096  # rows, or columns, that are in float64 at a time
_RANK = 1e-10  # eigenvalues below this share of the largest are rounding of scores in float32 or float64


def score_features(scores: Tensor, target_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Features of a pool, approximated in the span of the target examples (Nyström): for models of any size.

    With P the scores of the pool and K_t those of the targets for each other, Φ = P K_t^{-1/2} and
    Φ_t = K_t^{1/2}. Φ_t Φᵀ is exact, Φ Φᵀ = P K_t⁻¹ Pᵀ leaves out what of a pool gradient no target example sees.

    Args:
        scores: g_tᵀ (G + damping)⁻¹ g_i [m, n], as `InfluenceFunction.score(targets, pool)` gives them.
        target_scores: The same of targets for targets, [m, m].

    Returns:
        Features of the pool [n, r] and of the targets [m, r], float64, r <= m.

    Raises:
        ValueError: If shapes do not fit, or no target example has a gradient.
    """
    m = len(target_scores)
    if scores.dim() != 2 or target_scores.shape != (m, m) or len(scores) != m:
        raise ValueError(
            f"`score_features(scores={list(scores.shape)}, target_scores={list(target_scores.shape)})`: expected "
            "[m, n] and [m, m], of the same targets."
        )
    values, vectors = _spectrum(target_scores, "score_features")
    return scores.double().T @ (vectors / values.sqrt()), vectors * values.sqrt()


def unseen_squares(features: Tensor, squares: Tensor) -> Tensor:
    """Squared length of what the features leave out of each gradient, float64 [n]: 0 where they are whole.

    Args:
        features: Φ [n, r].
        squares: g_iᵀ (G + damping)⁻¹ g_i [n], as `InfluenceFunction.self_influence` gives them.

    Raises:
        ValueError: If shapes do not fit.
    """
    if features.dim() != 2 or squares.shape != features.shape[:1]:
        raise ValueError(
            f"`unseen_squares(features={list(features.shape)}, squares={list(squares.shape)})`: expected [n, r] "
            "and [n]."
        )
    return (squares.double() - features.double().square().sum(1)).clamp_min(0)


def kernel_features(kernel: Tensor, scores: Tensor, target_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Features of a small pool with exactly these inner products, up to rounding.

    Args:
        kernel: g_iᵀ (G + damping)⁻¹ g_j of the pool for itself, [n, n].
        scores: As for `score_features`, [m, n].
        target_scores: As for `score_features`, [m, m].

    Returns:
        Features of the pool [n, r] and of the targets [m, r], float64, r <= n + m.

    Raises:
        ValueError: If shapes do not fit, or no example has a gradient.
    """
    n, m = len(kernel), len(target_scores)
    if kernel.shape != (n, n) or target_scores.shape != (m, m) or scores.shape != (m, n):
        raise ValueError(
            f"`kernel_features(kernel={list(kernel.shape)}, scores={list(scores.shape)}, "
            f"target_scores={list(target_scores.shape)})`: expected [n, n], [m, n] and [m, m]."
        )
    rows = [torch.cat([kernel, scores.T], dim=1), torch.cat([scores, target_scores], dim=1)]
    values, vectors = _spectrum(torch.cat(rows), "kernel_features")
    both = vectors * values.sqrt()
    return both[:n], both[n:]


def thinned(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same inner products from at most n + m columns: [n, r] and [m, r] of longer rows, in float64.

    Rows that are no longer than that are returned as they are.
    """
    if features.shape[1] <= len(features) + len(targets):
        return features, targets
    return kernel_features(gram(features, features), gram(targets, features), gram(targets, targets))


def gram(left: Tensor, right: Tensor) -> Tensor:
    """Inner products [n, m] of rows, summed in float64, whatever the dtype of the rows.

    Over blocks of columns, and of the rows on the left: they may be a memory map that is larger than the memory.
    """
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for k in range(0, left.shape[1], BLOCK):
        others = right[:, k : k + BLOCK].double().T
        for found, rows in zip(torch.split(total, BLOCK), torch.split(left, BLOCK), strict=True):
            found += rows[:, k : k + BLOCK].double() @ others
    return total


def _spectrum(kernel: Tensor, call: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues that are no rounding, and their vectors."""
    kernel = kernel.double()
    values, vectors = torch.linalg.eigh((kernel + kernel.T) / 2)
    kept = values > _RANK * values.max()
    if not bool(kept.any()) or float(values.max()) <= 0:
        raise ValueError(f"`{call}`: all scores are 0; expected examples with gradients.")
    return values[kept], vectors[:, kept]
