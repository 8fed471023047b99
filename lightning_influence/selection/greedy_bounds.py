"""Lower bounds on the scores of a greedy choice, far cheaper than the scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors

REFERENCES = 64  # vectors W_e that the last exact scores of the rows may refer to
_SAMPLE = 256  # rows from which the leading directions are taken
_MOST_DIRECTIONS = 64
_TAIL = 0.01  # share of the squared norm that may be left to Cauchy-Schwarz when enough directions are kept
_MEMORY = 0.03  # of the features, for the coordinates along the directions
_FLOAT32, _FLOAT16, _FLOAT64 = 2.0**-24, 2.0**-11, 2.0**-53  # relative errors of rounding to nearest


@dataclass(frozen=True)
class BoundTable:
    """What the bounds at m vectors w have in common.

    Attributes:
        coordinates: Vᵀw [p, m] in the units of the stored coordinates.
        across: How far the farthest w is from each reference outside the directions [references].
        slack: What rounding may add per unit of a row's norm [references], at the worst w.
    """

    coordinates: Tensor
    across: Tensor
    slack: Tensor


class GreedyBounds:
    """Lower bounds on q_j − b_j + ⟨f_j, w⟩ for any w = M U, from an exact score of each row at some earlier vector.

    With orthonormal directions V [r, p], f_j = V c_j + g_j, and W the vector at which row j was last evaluated,

        score_j(w) = score_j(W) + ⟨c_j, Vᵀ(w − W)⟩ + ⟨g_j, w − W⟩,    |⟨g_j, w − W⟩| <= ‖g_j‖ ‖(I − VVᵀ)(w − W)‖:

    the part along the directions is exact, the rest is bounded by Cauchy-Schwarz. It holds for any M, definite or not,
    and for any V; V are the leading directions of a sample of the M f_j. Coordinates are kept in float16, the rest in
    float32, and everything that rounding may have changed is taken off the bounds, which are therefore never above
    the score that float64 gives.

    Attributes:
        low: Bound [n] less the part that depends on w, float32; infinite for rows that are out.
    """

    def __init__(self, pool: Factors) -> None:
        self._directions = _leading_directions(pool)
        n, p = len(pool), self._directions.shape[1]
        device = pool.values.device
        self.norms = torch.empty(n, device=device)
        self.own = torch.empty(n, dtype=torch.float64, device=device)
        self._rest = torch.empty(n, device=device)
        self._coordinates = torch.empty(n, p, dtype=torch.float16, device=device)
        self._scale = 1.0
        self._measure(pool)
        self.low = torch.zeros(n, device=device)
        self._line = torch.zeros(n, dtype=torch.uint8, device=device)
        self._references = self._directions.new_zeros(1, self._directions.shape[0])
        self._next = 1

    def _measure(self, pool: Factors) -> None:
        """Norms, self-interactions, coordinates and what they leave, in one pass over the features."""
        assert pool.features is not None
        start, largest = 0, torch.finfo(torch.float16).max / 2
        peak = pool.largest() if len(pool) else 0.0
        self._scale = max(peak * math.sqrt(pool.features.shape[1]) / largest, torch.finfo(torch.float32).tiny)
        for block in pool.blocks():
            part = slice(start, start + len(block))
            squares, along = block.square().sum(dim=1), block @ self._directions
            self.own[part] = squares if pool.metric is None else (block * pool.lift(block)).sum(dim=1)
            self.norms[part] = squares.sqrt()
            # the difference of squares is off by a few roundings of float64 per column
            off = 4 * len(self._directions) * _FLOAT64
            self._rest[part] = (squares - along.square().sum(dim=1)).clamp(min=0).add(off * squares).sqrt()
            self._coordinates[part] = along / self._scale
            start += len(block)
        # covers half a unit in the last place of the smallest float16 in each coordinate, in units of _FLOAT16
        self._floor = self._scale * math.sqrt(self._directions.shape[1]) * 2.0**-25 / _FLOAT16

    def rows_below(self, table: BoundTable, limits: Tensor, start: int, stop: int) -> Tensor:
        """Rows from start to stop whose bound does not exceed the limit [m] at every vector."""
        part = slice(start, stop)
        line = self._line[part].int()
        low = self.low[part] - self._rest[part] * table.across[line]
        low -= (self.norms[part] + self._floor) * table.slack[line]
        # limits and coordinates of a row are added up in float32, of which the limits take the roundings
        high = limits + limits.abs() * (len(table.coordinates) + 8) * _FLOAT32
        along = torch.addmm(-high.float(), self._coordinates[part].float(), table.coordinates).amin(dim=1)
        above = low + along > 0  # false for NaN, which numbers beyond float32 may give: such rows are looked at
        return (~above).nonzero().flatten() + start

    def estimates(self, w: Tensor, block: int) -> Tensor:
        """Scores [n] at a vector, float32, as if what the directions leave were 0."""
        coordinates = (w @ self._directions * self._scale).float()
        parts = [self._coordinates[i : i + block].float() @ coordinates for i in range(0, len(self.low), block)]
        return torch.cat(parts).add_(self.low)

    def table(self, vectors: Tensor) -> BoundTable:
        """The common part of the bounds at vectors [m, r], float64."""
        along, reference_along = vectors @ self._directions, self._references @ self._directions
        p, r = len(along.T), vectors.shape[1]
        sizes = self._references.norm(dim=1)[:, None] + vectors.norm(dim=1)
        products = self._references @ vectors.T
        squares = self._references.square().sum(1)[:, None] + vectors.square().sum(1) - 2 * products
        shift = torch.cdist(reference_along, along, compute_mode="donot_use_mm_for_euclid_dist")
        across = (squares - shift.square()).clamp(min=0) + 8 * r * _FLOAT64 * sizes.square()
        slack = (p + 16) * _FLOAT32 * sizes + 1.01 * _FLOAT16 * shift
        up = 1 + 8 * _FLOAT32
        across, slack = (part.amax(dim=1).mul(up).float() for part in (across.sqrt(), slack))
        return BoundTable((along.T * self._scale).float(), across, slack)

    def add_reference(self, w: Tensor) -> int:
        """Makes w [r] a reference and returns its line; rows that refer to the one it replaces are brought over."""
        if len(self._references) < REFERENCES:
            self._references = torch.cat([self._references, w[None]])
            return len(self._references) - 1
        line = self._next % REFERENCES
        self._next += 1
        rows = (self._line == line).nonzero().flatten()
        table = self.table(w[None])
        fall = self._rest[rows] * table.across[line] + (self.norms[rows] + self._floor) * table.slack[line]
        self.low[rows] -= fall * (1 + 4 * _FLOAT32)
        self.low[rows] -= self.low[rows].abs() * 2 * _FLOAT32
        self._references[line] = w
        return line

    def refresh(self, rows: Tensor, low: Tensor, line: int) -> None:
        """Takes in lower ends [rows] of exact scores at the reference of that line, float64."""
        along = self._coordinates[rows].double() @ (self._references[line] @ self._directions * self._scale)
        low = low - along
        low = low - 4 * _FLOAT32 * (low.abs() + along.abs())
        largest = torch.finfo(torch.float32).max
        self.low[rows] = torch.where(low.isinf(), low, low.clamp(max=largest)).float()
        self._line[rows] = line

    def upper_norms(self, rows: Tensor) -> Tensor:
        """Upper ends [rows] of ‖f_j‖, float64."""
        return self.norms[rows].double() * (1 + 4 * _FLOAT32) + self._floor

    def drop(self, rows: int | Tensor) -> None:
        """Leaves a row, or rows [n], bool, out from now on."""
        self.low[rows] = torch.inf


def _leading_directions(pool: Factors) -> Tensor:
    """Orthonormal [r, p], float64: the leading directions of M f over evenly spaced rows."""
    assert pool.features is not None
    n, r = pool.features.shape
    sample = torch.arange(0, n, -(-n // _SAMPLE), device=pool.values.device)
    rows = pool.lift(pool.features[sample].double())
    rows /= rows.norm(dim=1).max().clamp(min=torch.finfo(torch.float64).tiny)
    spectrum, left = torch.linalg.eigh(rows @ rows.T)
    spectrum, left = spectrum.flip(0).clamp(min=0), left.flip(1)
    kept = spectrum.cumsum(0) <= (1 - _TAIL) * spectrum.sum()
    room = int(_MEMORY * r * pool.features.element_size() / 2)
    p = max(1, min(int(kept.sum()) + 1, _MOST_DIRECTIONS, room, r, len(sample)))
    directions: Tensor = torch.linalg.qr(rows.T @ left[:, :p]).Q
    return directions
