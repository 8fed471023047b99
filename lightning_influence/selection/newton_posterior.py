"""What the rows chosen so far leave of all others, for `NewtonGreedy`: kept up to date pick by pick."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.admission import Admission

_ROUNDING = 64 * torch.finfo(torch.float64).eps  # what a product of a few thousand terms may be off
_ROOM = 1024  # vectors that there is room for at first
_TOGETHER = 128  # rows whose gains are found together


class Shrinkage:
    """P = (I + Φ_Sᵀ D⁻¹ Φ_S)⁻¹ [r, r], D the dampings of the rows chosen, S; as I − P = QᵀQ.

    Q has a row q_s = Pφ_s / sqrt(d_s + φ_sᵀPφ_s) for each s of S, with P as it was before s. Rows are tried first, and
    then kept or dropped. Kept ones are multiplied out as soon as QᵀQ takes no more room than they do.

    Args:
        zero: Any vector [r] of zeros, float64, on the device.
    """

    def __init__(self, zero: Tensor) -> None:
        self._kept, self._tried = zero.new_empty(min(_ROOM, len(zero)), len(zero)), zero.new_empty(0, len(zero))
        self._count = 0
        self._whole: Tensor | None = None  # P, once it is multiplied out

    def __call__(self, vectors: Tensor) -> Tensor:
        """P applied to vectors [..., r], with the rows that are tried."""
        if self._whole is None:
            kept = self._kept[: self._count]
            left = vectors - (vectors @ kept.T) @ kept
        else:
            left = vectors @ self._whole
        return left - (vectors @ self._tried.T) @ self._tried

    def attempt(self, rows: Tensor) -> None:
        """Adds rows [t, r] to Q, for now."""
        self._tried = torch.cat([self._tried, rows])

    def keep(self, count: int) -> None:
        """Keeps the first rows of those that are tried and drops the others."""
        rows, self._tried = self._tried[:count], self._tried[:0]
        width = rows.shape[1]
        if self._whole is None and self._count + count >= width:
            self._whole = torch.eye(width).to(rows)
            self._whole.addmm_(self._kept[: self._count].T, self._kept[: self._count], alpha=-1)
            self._kept = rows[:0]
        if self._whole is not None:
            self._whole.addmm_(rows.T, rows, alpha=-1)
            return
        while self._count + count > len(self._kept):
            self._kept = torch.cat([self._kept, torch.empty_like(self._kept)])
        self._kept[self._count : self._count + count] = rows
        self._count += count


class Posterior:
    """For every row j of a pool: what adding it to the rows chosen would do.

    ``size`` φ_jᵀPφ_j, ``predicted`` wᵀφ_j, ``slope`` (b̄ − M w)ᵀPφ_j, ``bend`` φ_jᵀP M Pφ_j. Adding j moves w by c Pφ_j
    with c = (1 − wᵀφ_j) / (d_j + φ_jᵀPφ_j), which changes J by −c · slope + ½ c² · bend.

    Args:
        pool: The rows, with features.
        dampings: d_j [n]: μ and the row's unseen part.
    """

    def __init__(self, pool: Factors, dampings: Tensor) -> None:
        self.dampings, self.values, self.ranks = dampings, pool.values, pool.id_ranks
        self.norms = pool.norms()
        self.size, self.slope, self.bend = self.norms.square(), pool.values.clone(), pool.self_interactions()
        self.predicted = torch.zeros_like(self.slope)
        self.moved = pool.shift([])  # w
        self.spread = 1.0 if pool.metric is None else float(pool.metric.norm())
        self.chosen = 0

    def part(self, rows: Tensor) -> Self:
        """The same of some rows, to go on with by themselves."""
        found = copy.copy(self)
        for name in ("dampings", "values", "ranks", "norms", "size", "slope", "bend", "predicted"):
            setattr(found, name, getattr(self, name)[rows])
        return found

    def best(self, admission: Admission, may: Tensor, rows: Tensor | None = None) -> tuple[int, float, Tensor]:
        """The row that lowers J most, and by how much; the smallest id among those rounding cannot tell apart.

        Args:
            admission: For costs.
            may: Which rows may be picked [n], bool.
            rows: Their numbers in the pool of the admission, for a part of it.

        Returns:
            Row, change of J, and what rows were compared by [n], smaller is better, infinite where they may not.
        """
        steps = (1 - self.predicted) / (self.dampings + self.size)
        scores = -steps * self.slope + 0.5 * steps.square() * self.bend
        errors = admission.error_per_cost(self._errors(steps), rows)
        weighed = -admission.per_cost(-scores, rows)
        weighed[~may] = torch.inf
        tied = (weighed - errors <= (weighed + errors).min()).nonzero().flatten()
        pick = int(tied[self.ranks[tied].argmin()])
        return pick, float(scores[pick]), weighed

    def add(self, row: int, column: Tensor, overlap: Tensor, bent: Tensor) -> None:
        """Adds a row to those chosen.

        Args:
            row: Its number.
            column: Pφ_row [r].
            overlap: φ_jᵀPφ_row [n].
            bent: φ_jᵀP M Pφ_row [n].
        """
        whole = self.dampings[row] + overlap[row]
        step = (1 - self.predicted[row]) / whole
        slope, bend = self.slope[row].clone(), bent[row].clone()
        share = overlap / whole
        self.bend += share * (share * bend - 2 * bent)
        self.slope += share * (step * bend - slope) - step * bent
        self.predicted += step * overlap
        self.size -= share * overlap
        self.moved = self.moved + step * column
        self.chosen += 1

    def _errors(self, steps: Tensor) -> Tensor:
        """What rounding may have done to the scores."""
        reach = self.norms * self.moved.norm()
        squares = self.norms.square()
        step_errors = (1 + reach + steps.abs() * squares) / (self.dampings + self.size)
        slope_errors = self.values.abs() + self.spread * reach
        found: Tensor = (steps * self.bend - self.slope).abs() * step_errors
        found += steps.abs() * slope_errors + 0.5 * steps.square() * self.spread * squares
        return found * (_ROUNDING * math.sqrt(1 + self.chosen))


def newton_gains(pool: Factors, rows: Tensor, dampings: Tensor) -> tuple[Tensor, Tensor]:
    """What each row changes of J when they are added in this order: −c · slope and ½ c² · bend, [k] each.

    Args:
        pool: With features.
        rows: Numbers of rows [k].
        dampings: d of each of them [k].
    """
    left, moved = Shrinkage(pool.shift([])), pool.shift([])
    gone = torch.zeros_like(moved)  # (I − P) b̄
    first_order, interaction = [], []
    for part, own in zip(torch.split(rows, _TOGETHER), torch.split(dampings, _TOGETHER), strict=True):
        assert pool.features is not None
        features = pool.features[part].double()
        reached, columns = left(features), torch.empty_like(features)  # columns: q of each row
        steps, slopes = torch.empty_like(own), torch.empty_like(own)
        before = torch.empty_like(features)
        for k, row in enumerate(features):
            column = reached[k] - columns[:k].T @ (columns[:k] @ row)
            length = (own[k] + column @ row).sqrt()
            columns[k], before[k] = column / length, moved
            steps[k], slopes[k] = (1 - moved @ row) / length, (pool.values[part[k]] - gone @ row) / length
            moved, gone = moved + steps[k] * columns[k], gone + slopes[k] * columns[k]
        left.attempt(columns)
        left.keep(len(columns))
        lifted = pool.lift(columns)
        first_order.append(-steps * (slopes - (before * lifted).sum(1)))
        interaction.append(0.5 * steps.square() * (columns * lifted).sum(1))
    return torch.cat(first_order), torch.cat(interaction)
