"""How far two lists of numbers agree in their order: estimates, and what retraining really did ([IA] section 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_influence.metrics.intervals import Interval

Rank: TypeAlias = Literal["spearman", "kendall"]

_BLOCK = 2**22  # numbers that are worked on at a time


def average_ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension, 1 for the smallest; equal values share the mean of their places.

    >>> average_ranks(torch.tensor([0.5, 0.1, 0.5]))
    tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    rows = values.reshape(-1, values.shape[-1]).contiguous()
    ordered = rows.sort(1).values
    below, upto = (torch.searchsorted(ordered, rows, right=right) for right in (False, True))
    return ((below + upto + 1).double() / 2).reshape(values.shape)


def spearman(left: Tensor, right: Tensor) -> Tensor:
    """Spearman's rank correlation along the last dimension: Pearson's, of `average_ranks`.

    Args:
        left: [..., n], any real dtype.
        right: The same shape.

    Returns:
        [...], float64, in [-1, 1]; 0 where one side is constant and so orders nothing.

    Raises:
        ValueError: If shapes differ, n < 2, or a number is NaN.

    >>> spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 4.0, 3.0]))
    tensor(0.8000, dtype=torch.float64)
    """
    _check(left, right, "spearman")
    return _pearson(average_ranks(left), average_ranks(right))


def kendall(left: Tensor, right: Tensor) -> Tensor:
    """Kendall's τ-b along the last dimension; takes, gives and refuses what `spearman` does. O(n²).

    >>> kendall(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 4.0, 3.0]))
    tensor(0.6667, dtype=torch.float64)
    """
    _check(left, right, "kendall")
    n = left.shape[-1]
    rows = [values.reshape(-1, n) for values in (left, right)]
    step = max(1, _BLOCK // n**2)
    parts = zip(*(values.split(step) for values in rows), strict=True)  # type: ignore[no-untyped-call]
    found = torch.cat([_tau(a, b) for a, b in parts]) if rows[0].numel() else rows[0].new_zeros(0).double()
    return found.reshape(left.shape[:-1])


def mean_absolute_error(left: Tensor, right: Tensor) -> Tensor:
    """Mean of |left - right| along the last dimension, float64."""
    return (left.double() - right.double()).abs().mean(-1)


MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "spearman": spearman,
    "kendall": kendall,
    "mae": mean_absolute_error,
}


def resampled(
    measure: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor, seed: int = 0, resamples: int = 1000
) -> Tensor:
    """A measure when columns are drawn again and again, with replacement; the same seed draws the same columns.

    Args:
        measure: Of [..., n] and [..., n], such as `spearman`.
        left: [..., n].
        right: The same shape; a column of both is one case.
        seed: Of the draws.
        resamples: Number of draws.

    Returns:
        [resamples, ...], float64.
    """
    n = left.shape[-1]
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    step = max(1, _BLOCK // max(1, left.numel()))
    first, second = left.cpu(), right.cpu()
    parts = (
        measure(first[..., rows].movedim(-2, 0), second[..., rows].movedim(-2, 0))
        for rows in draws.split(step)  # type: ignore[no-untyped-call]
    )
    return torch.cat(list(parts))


def percentile_interval(draws: Tensor) -> Interval:
    """The middle 95 % of some numbers [n].

    >>> percentile_interval(torch.arange(101.0))
    (2.5, 97.5)
    """
    low, high = draws.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


class RankAgreement(Metric):
    """Mean rank correlation over rows, such as the targets of the LDS, over batches and ranks.

    Args:
        kind: ``"spearman"`` or ``"kendall"``.

    Raises:
        ValueError: If the kind is unknown.

    >>> agreement = RankAgreement()
    >>> agreement.update(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.1, 0.2, 0.3]]))
    >>> agreement.update(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.1, 0.3, 0.2]]))
    >>> agreement.compute()
    tensor(0.7500)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correlations: Tensor
    rows: Tensor

    def __init__(self, kind: Rank = "spearman", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if kind not in get_args(Rank):
            raise ValueError(f"`RankAgreement(kind={kind!r})`: expected 'spearman' or 'kendall'.")
        self.kind = kind
        self.add_state("correlations", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, estimates: Tensor, measured: Tensor) -> None:
        """Count the rows of one batch, [q, n] or a single one [n].

        Raises:
            ValueError: As `spearman`.
        """
        found = MEASURES[self.kind](estimates, measured)
        self.correlations += found.sum()
        self.rows += found.numel()

    def compute(self) -> Tensor:
        """Mean over everything counted, a scalar, float32.

        Raises:
            ValueError: If nothing was counted.
        """
        if self.rows == 0:
            raise ValueError("rank agreement of no row: expected at least one.")
        return (self.correlations / self.rows).float()


def _pearson(left: Tensor, right: Tensor) -> Tensor:
    left, right = (ranks - ranks.mean(-1, keepdim=True) for ranks in (left, right))
    scale = (left.square().sum(-1) * right.square().sum(-1)).sqrt()
    return torch.where(scale > 0, (left * right).sum(-1) / scale, 0.0).clamp(-1, 1)


def _tau(left: Tensor, right: Tensor) -> Tensor:
    """Of rows [r, n]: every pair counts twice above and below the line."""
    signs = [
        ((v[:, :, None] > v[:, None]).to(torch.int8) - (v[:, :, None] < v[:, None]).to(torch.int8))
        for v in (left, right)
    ]
    agreed = (signs[0] * signs[1]).sum((1, 2)).double()
    scale = (signs[0].abs().sum((1, 2)).double() * signs[1].abs().sum((1, 2)).double()).sqrt()
    return torch.where(scale > 0, agreed / scale, 0.0)


def _check(left: Tensor, right: Tensor, what: str) -> None:
    if left.shape != right.shape or left.dim() < 1 or left.shape[-1] < 2 or left.is_complex() or right.is_complex():
        raise ValueError(
            f"`{what}(left, right)`: expected two real tensors [..., n] of one shape with n >= 2. Got shapes "
            f"{list(left.shape)} and {list(right.shape)}."
        )
    for name, values in (("left", left), ("right", right)):
        if values.isnan().any():
            columns = values.reshape(-1, values.shape[-1]).isnan().any(0).nonzero().flatten().tolist()
            raise ValueError(f"`{what}({name})`: expected numbers, found NaN at positions {columns[:8]}.")
