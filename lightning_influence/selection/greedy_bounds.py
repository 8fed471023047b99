"""Lower bounds on the scores of a greedy choice, far cheaper than the scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors

_ROWS = 2048  # whose bounds are taken at a time
REFERENCES = 64  # vectors W_e that the last exact scores of the rows may refer to
_SAMPLE = 256  # rows from which the leading directions are taken
_MOST_DIRECTIONS = 64
_TAIL = 0.01  # share of the squared norm that may be left to Cauchy-Schwarz when enough directions are kept
_SORTED = 2**16  # rows among which the best are looked for at a time
_MEMORY = 0.02  # of the features, for the coordinates along the directions
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

    What is as large as a block of rows is allocated once: freed blocks with small results between them would add up.

    Attributes:
        low: Bound [n] less the part that depends on w, float32; infinite for rows that are out.

    Args:
        pool: The rows.
        most: Vectors at which bounds are taken at a time.
    """

    def __init__(self, pool: Factors, most: int) -> None:
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
        size = min(n, _ROWS)
        self._below = torch.zeros(n, dtype=torch.bool, device=device)
        self._estimates = self.low.new_empty(min(n, _SORTED))
        self._block, self._products = self.low.new_empty(size, p), self.low.new_empty(size * most)

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

    def rows_below(self, table: BoundTable, limits: Tensor) -> Tensor:
        """Rows whose bound does not exceed the limit [m] at every vector, in order."""
        # limits and coordinates of a row are added up in float32, of which the limits take the roundings
        high = (limits + limits.abs() * (len(table.coordinates) + 8) * _FLOAT32).float()
        for part, coordinates in self._blocks(0, len(self.low)):
            line = self._line[part].int()
            low = self.low[part] - self._rest[part] * table.across[line]
            low -= (self.norms[part] + self._floor) * table.slack[line]
            along = self._products[: len(line) * len(high)].view(len(line), -1)
            torch.addmm(-high, coordinates, table.coordinates, out=along)
            # false for NaN, which numbers beyond float32 may give: such rows are looked at
            above = low + along.amin(dim=1) > 0
            torch.logical_not(above, out=self._below[part])
        return self._below.nonzero().flatten()

    def lowest(self, w: Tensor, count: int) -> Tensor:
        """``count`` rows with the smallest scores at a vector, as if what the directions leave were 0."""
        direction = (w @ self._directions * self._scale).float()
        best, n = [], len(self.low)
        for start in range(0, max(n, 1), _SORTED):
            stop = min(start + _SORTED, n)
            estimates = self._estimates[: stop - start]
            for part, coordinates in self._blocks(start, stop):
                torch.mv(coordinates, direction, out=estimates[part.start - start : part.stop - start])
            scores, places = estimates.add_(self.low[start:stop]).topk(min(count, len(estimates)), largest=False)
            best.append((scores, places + start))
        scores, rows = (torch.cat(parts) for parts in zip(*best, strict=True))
        return rows[scores.topk(min(count, len(rows)), largest=False).indices]

    def _blocks(self, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive rows and their coordinates, float32, valid until the next."""
        for part in slices(start, stop):
            coordinates = self._coordinates[part]
            yield part, self._block[: len(coordinates)].copy_(coordinates)

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
        table = self.table(w[None])
        for part in slices(0, len(self.low)):
            rows = (self._line[part] == line).nonzero().flatten() + part.start
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


def slices(start: int, stop: int) -> Iterator[slice]:
    """Consecutive rows whose bounds are taken, or taken in, at a time."""
    return (slice(first, min(first + _ROWS, stop)) for first in range(start, stop, _ROWS))


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
