"""How well the source is found as more and more parameters are looked at."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lightning_influence.metrics.intervals import Interval, wilson_interval
from lightning_influence.metrics.retrieval import retrieval_ranks
from lightning_influence.selection.component_cross_validation import (
    ComponentCrossValidation,
    group_numbers,
    held_out_interval,
)
from lightning_influence.selection.component_greedy import greedy_components
from lightning_influence.selection.component_objective import Objective
from lightning_influence.selection.component_pairs import ComponentPairs
from lightning_influence.selection.component_path import ComponentPath


@dataclass(frozen=True)
class ShareCurve:
    """Retrieval accuracy over the share of the parameters; a single point is a curve too.

    Attributes:
        label: What it is, for a legend.
        shares: Shares in (0, 1], ascending.
        values: The accuracy at each.
        intervals: 95 % confidence interval at each; None where there is none.
    """

    label: str
    shares: tuple[float, ...]
    values: tuple[float, ...]
    intervals: tuple[Interval, ...] | None = None

    def __post_init__(self) -> None:
        """Every share has a value."""
        lengths = {len(self.shares), len(self.values), len(self.intervals or self.values)}
        if len(lengths) != 1 or not self.shares:
            raise ValueError(
                f"`ShareCurve(label={self.label!r})`: expected as many values, and intervals, as shares and at least "
                f"one; got {len(self.values)} values for {len(self.shares)} shares."
            )


def prefix_ranks(pairs: ComponentPairs, order: Sequence[str], eps: float = 0.0) -> Tensor:
    """Ranks of the true sources by cos_S for every S that begins ``order``: after 1, 2, ... components.

    Sums are float64.

    Returns:
        int64 [len(order), q], as `retrieval_ranks` gives them.

    Raises:
        ValueError: If a name is not a component's (the nearest are given), or comes twice.
    """
    rows = pairs.rows(order)
    dots, own, other = (
        values[rows].double().cumsum(0) for values in (pairs.dots, pairs.query_squares, pairs.candidate_squares)
    )
    lengths = own.sqrt()[..., None] * other.sqrt()
    cosines = torch.where(lengths > 0, dots / (lengths + eps), 0)
    return torch.stack([retrieval_ranks(scores, pairs.target, pairs.mask) for scores in cosines]).cpu()


def path_curve(
    pairs: ComponentPairs,
    path: ComponentPath,
    label: str,
    *,
    groups: Sequence[Hashable] | None = None,
    eps: float = 0.0,
) -> ShareCurve:
    """Accuracy after each step of a forward path, whatever the path was chosen by.

    If the path was chosen on these queries the accuracy is in-sample: see `held_out_curve`. Intervals are Wilson's
    with one case for each group.

    Args:
        pairs: Products of the queries that it is measured on.
        path: From `greedy_components`.
        label: Of the curve.
        groups: As in `cross_validate_components`.
        eps: ε of the cosine.

    Raises:
        ValueError: If components were removed, not added, or are not those of the pairs.
    """
    _forward("path_curve", path)
    cases = int(group_numbers(groups, pairs.num_queries, "path_curve").max()) + 1
    values = (prefix_ranks(pairs, path.order, eps) == 1).double().mean(1).tolist()
    return ShareCurve(label, path.shares, tuple(values), tuple(wilson_interval(value, cases) for value in values))


def held_out_curve(
    pairs: ComponentPairs,
    choice: ComponentCrossValidation,
    label: str,
    *,
    groups: Sequence[Hashable] | None = None,
    points: int = 80,
    eps: float = 0.0,
) -> ShareCurve:
    """Accuracy on queries that the components were not chosen on: a path for every split, averaged at equal shares.

    At a share of x every path gives its last step that takes no more than x. Every path is searched again.

    Args:
        pairs: Those that were cross-validated.
        choice: From `cross_validate_components`.
        label: Of the curve.
        groups: As in `cross_validate_components`.
        points: Number of shares, evenly on a logarithmic scale.
        eps: As there.

    Raises:
        ValueError: If components were removed, not added, the pairs are others, or there are fewer than two points.
    """
    _forward("held_out_curve", choice.path)
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ValueError(f"`held_out_curve(points={points!r})`: expected an int >= 2.")
    member = group_numbers(groups, pairs.num_queries, "held_out_curve")
    if choice.path.components != tuple(pairs.components) or any(
        len(split.chosen_on) + len(split.held_out) != pairs.num_queries for split in choice.splits
    ):
        raise ValueError("`held_out_curve(pairs, choice)`: expected the pairs that were cross-validated.")
    paths = [
        greedy_components(
            pairs.queries(split.chosen_on), cast(Objective, choice.path.objective), eps=eps, progress=False
        )
        for split in choice.splits
    ]
    grid = _grid(max(path.shares[0] for path in paths), points)
    hits = torch.full((points, len(paths), pairs.num_queries), torch.nan, dtype=torch.float64)
    for row, (path, split) in enumerate(zip(paths, choice.splits, strict=True)):
        found = (prefix_ranks(pairs, path.order, eps) == 1).double()
        steps = torch.searchsorted(torch.tensor(path.shares, dtype=torch.float64), grid, right=True) - 1
        held = list(split.held_out)
        hits[:, row, held] = found[steps][:, held]
    values = hits.nanmean(2).mean(1).tolist()
    intervals = [held_out_interval(part, member, "accuracy") for part in hits]
    return ShareCurve(label, tuple(grid.tolist()), tuple(values), tuple(intervals))


def _grid(first: float, points: int) -> Tensor:
    """Shares from the first to all parameters, evenly on a logarithmic scale; both ends exactly, float64 [points]."""
    grid = torch.logspace(0, 1, points, base=1 / first, dtype=torch.float64) * first
    grid[0], grid[-1] = first, 1.0
    return grid


def _forward(call: str, path: ComponentPath) -> None:
    if path.direction != "forward":
        raise ValueError(f"`{call}(path)`: expected a path that adds components, got direction={path.direction!r}.")
