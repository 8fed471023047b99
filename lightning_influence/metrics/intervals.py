"""95 % confidence intervals of means over queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Interval = tuple[float, float]

_Z = 1.959963984540054  # of the normal distribution, two-sided 95 %


def wilson_interval(share: float, number: int) -> Interval:
    """Score interval of Wilson (1927) of a share among ``number`` independent cases; sound at 0 and 1 too.

    Raises:
        ValueError: If the share is not in [0, 1] or the number below 1.

    >>> low, high = wilson_interval(0.9, 100)
    >>> round(low, 3), round(high, 3)
    (0.826, 0.945)
    >>> wilson_interval(1.0, 100)[0] < 0.97
    True
    """
    if not 0 <= share <= 1 or number < 1:
        raise ValueError(f"`wilson_interval(share={share!r}, number={number!r})`: expected a share in [0, 1] of >= 1.")
    scale = 1 + _Z**2 / number
    middle = share + _Z**2 / (2 * number)
    half = _Z * math.sqrt(share * (1 - share) / number + _Z**2 / (4 * number**2))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def normal_interval(values: Tensor, number: float | None = None) -> Interval:
    """Mean of independent values ± 1.96 standard errors.

    Args:
        values: [n].
        number: Cases that the mean is worth; None: n.

    Returns:
        Both ends; infinite for a single value, whose spread is unknown.

    >>> low, high = normal_interval(torch.tensor([0.0, 1.0]).repeat(50))
    >>> round(low, 2), round(high, 2)
    (0.4, 0.6)
    """
    if len(values) < 2:
        return -math.inf, math.inf
    wide = values.double()
    half = _Z * float(wide.std()) / math.sqrt(len(values) if number is None else number)
    mean = float(wide.mean())
    return mean - half, mean + half


def student_interval(values: Tensor) -> Interval:
    """Mean of a few independent values, such as one for each seed, ± Student's t standard errors.

    Args:
        values: [n].

    Returns:
        Both ends; infinite for a single value, whose spread is unknown.

    >>> low, high = student_interval(torch.tensor([1.0, 2.0, 3.0]))
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    if len(values) < 2:
        return -math.inf, math.inf
    wide = values.double()
    half = _student(len(values) - 1) * float(wide.std()) / math.sqrt(len(values))
    mean = float(wide.mean())
    return mean - half, mean + half


def bootstrap_interval(values: Tensor, groups: Tensor, seed: int = 0, resamples: int = 2000) -> list[Interval]:
    """Percentile intervals of means over queries when whole groups of queries are drawn again and again.

    Args:
        values: [m, q]: m statistics of the same q queries, which share the draws.
        groups: Number [q] of the group of each query, 0, 1, ...; queries of one group are drawn together.
        seed: Of the draws.
        resamples: Number of draws.

    >>> [(low, high)] = bootstrap_interval(torch.tensor([[0.0, 1.0]]).repeat(1, 50), torch.arange(100))
    >>> bool(0.37 < low < 0.43 < 0.57 < high < 0.63)
    True
    """
    number = int(groups.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(number, (resamples, number), generator=generator)
    times = torch.zeros(resamples, number, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())
    sums = torch.zeros(len(values), number, dtype=torch.float64).index_add_(1, groups.cpu(), values.double().cpu())
    means = (times @ sums.T) / (times @ torch.bincount(groups.cpu(), minlength=number).double())[:, None]
    ends = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return [(low, high) for low, high in ends.T.tolist()]


def _student(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's distribution: t = √ν tan u, where u has the density cos^(ν-1) u."""
    angles = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angles.cos() ** (freedom - 1), angles)
    place = int(torch.searchsorted(mass, 0.95 * mass[-1]))
    low, high = float(mass[place - 1]), float(mass[place])
    angle = float(angles[place]) + (0.95 * float(mass[-1]) - low) / (high - low) * float(angles[1])
    return math.sqrt(freedom) * math.tan(angle)
