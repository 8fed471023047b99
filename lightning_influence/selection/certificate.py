"""How far a selection can be from the best one: a lower bound from a convex problem."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_influence.capture.contexts import full_precision
from lightning_influence.estimators.factors import Factors, Id
from lightning_influence.selection.base import check_pool
from lightning_influence.selection.greedy_ties import ROUNDING
from lightning_influence.selection.selection import Selection

_DENSE = 1024  # pools of so many rows: K is formed and its diagonal used to tighten the bound


@full_precision()
def certify(
    selection: Selection,
    values: Tensor,
    features: Tensor | None = None,
    metric: Tensor | None = None,
    *,
    ids: Iterable[Id] | None = None,
    tolerance: float = 1e-4,
    steps: int = 100,
) -> Selection:
    """The selection with a lower bound on the objective of any choice of as many rows.

    With x_j = 1 for chosen rows the objective is −b·x + ½ xᵀKx ([IA] section 3.2). Over 0 <= x <= 1, Σx = k it is a
    convex quadratic when M is positive semi-definite, and its minimum a lower bound. It is approached by fully
    corrective Frank-Wolfe steps: the k rows of the smallest slope are added to the corners found so far and the
    quadratic is minimised over their convex hull. At every step the duality gap, whatever the precision of that
    minimum, proves the bound

        Σ of the k smallest (−b_j + ⟨w_j, U⟩) − ½ UᵀMU,

    of which the largest is returned. A step costs about one pick of plain Algorithm 1, in float64.

    In pools of up to 1,024 rows, D = λ diag(K), λ the smallest eigenvalue of K scaled to a unit diagonal, is taken out
    of the quadratic and ½ Dx is added, which changes nothing where x is 0 or 1: it makes an indefinite problem convex,
    and the bound of rows that do not interact exact.

    Args:
        selection: Of any rule.
        values: b [n], as given to the rule; b_j > 0: adding row j lowers the target loss.
        features: F [n, r], as given to the rule.
        metric: M [r, r], as given to the rule.
        ids: As given to the rule.
        tolerance: Stop when the relaxed problem is solved to this share of its minimum.
        steps: The most steps.

    Returns:
        The selection with ``lower_bound``; ``optimality_gap`` tells how much there is to win at most. The gap has two
        parts that cannot be told apart: what the selection lacks, and what the relaxation gains by choosing rows in
        part.

    Raises:
        ValueError: If pool and selection do not fit, an argument is out of range, or the metric is indefinite and the
            pool has more than 1,024 rows.
    """
    call = "certify"
    pool = Factors.checked(call, values, features, metric, ids)
    _check(pool, selection, tolerance, steps)
    if pool.features is None:
        bound = -float(pool.values.topk(len(selection)).values.sum())
    else:
        bound = _relaxed(_convex(pool), len(selection), tolerance, steps)
    return selection.certified(bound)


def _check(pool: Factors, selection: Selection, tolerance: float, steps: int) -> None:
    check_pool("certify", pool, selection)
    if not tolerance > 0:
        raise ValueError(f"`certify(tolerance={tolerance!r})`: expected a number > 0, such as 1e-4.")
    if type(steps) is not int or steps < 1:
        raise ValueError(f"`certify(steps={steps!r})`: expected an int >= 1.")


def _convex(pool: Factors) -> Factors:
    """A pool with the same objective for every group, whose quadratic is convex."""
    assert pool.features is not None
    if len(pool) > _DENSE:
        _refuse_indefinite(pool)
        return pool
    rows = pool.features.double()
    dense = pool.lift(rows) @ rows.T
    largest = float(dense.abs().max())
    if largest == 0:
        return pool
    diagonal = dense.diagonal().abs().clamp(min=1e-6 * largest)
    scaled = dense / (diagonal[:, None] * diagonal).sqrt()
    smallest = torch.linalg.eigvalsh(scaled)[0] - ROUNDING * len(pool) * scaled.abs().max()
    shift = smallest * diagonal
    spectrum, vectors = torch.linalg.eigh(dense - shift.diag())
    return Factors(pool.values - 0.5 * shift, vectors * spectrum.clamp(min=0).sqrt(), None, pool.ids)


def _refuse_indefinite(pool: Factors) -> None:
    if pool.metric is None:
        return
    spectrum = torch.linalg.eigvalsh(pool.metric)
    if spectrum[0] < -ROUNDING * len(spectrum) * spectrum.abs().max():
        raise ValueError(
            f"`certify(metric)`: expected a positive semi-definite metric for a pool of more than {_DENSE} rows: the "
            f"relaxed problem is not convex otherwise. Its eigenvalues go from {float(spectrum[0]):.3g} to "
            f"{float(spectrum[-1]):.3g}. Take a Gauss-Newton or Fisher matrix of the target instead of its Hessian."
        )


def _relaxed(pool: Factors, k: int, tolerance: float, steps: int) -> float:
    """The best bound of so many steps."""
    norms, size = pool.norms(), 1.0 if pool.metric is None else float(pool.metric.norm())
    corners: list[Tensor] = []
    gains: list[Tensor] = []
    total, bound = pool.shift([]), -math.inf
    weights = total.new_zeros(0)
    for _ in range(steps):
        direction = pool.lift(total)
        slopes = pool.products(direction) - pool.values
        chosen = slopes.topk(k, largest=False)
        rounding = ROUNDING * float(
            (pool.values.abs() + norms * (direction.norm() + size * total.norm()))[chosen.indices].sum()
        )
        dual = float(chosen.values.sum() - 0.5 * total @ direction) - rounding
        bound = max(bound, dual)
        if corners:
            primal = float(0.5 * total @ direction - weights @ torch.stack(gains))
            if primal - bound <= tolerance * abs(bound):
                break
        corners.append(pool.shift(chosen.indices.tolist()))
        gains.append(pool.values[chosen.indices].sum())
        points = torch.stack(corners)
        weights = _hull(points @ pool.lift(points).T, torch.stack(gains), weights)
        total = weights @ points
    return bound


def _hull(quadratic: Tensor, linear: Tensor, before: Tensor, iterations: int = 300) -> Tensor:
    """Weights λ >= 0, Σλ = 1 with −linear·λ + ½ λᵀQλ small, by accelerated projected gradients from those before."""
    weights = torch.cat([before, before.new_full((1,), float(len(before) == 0))])
    step = 1 / quadratic.norm().clamp(min=torch.finfo(torch.float64).tiny)
    ahead, momentum = weights, 1.0
    for _ in range(iterations):
        moved = _onto_simplex(ahead - step * (quadratic @ ahead - linear))
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = moved + (momentum - 1) / following * (moved - weights)
        weights, momentum = moved, following
    return weights


def _onto_simplex(point: Tensor) -> Tensor:
    """The nearest weights that are not negative and add up to 1."""
    ordered = point.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1) / torch.arange(1, len(point) + 1, device=point.device)
    return (point - excess[int((ordered > excess).sum()) - 1]).clamp(min=0)
