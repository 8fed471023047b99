"""Exact scores of the rows that may still win, at every step of a predicted path."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.greedy_path import Path
from lightning_influence.selection.greedy_ties import ROUNDING

_COLUMNS = 512  # products of so many terms are summed in one go: bounds the rounding error of float32
_KEPT = 8  # steps at which the scores of all rows are kept, besides the end
_MEMORY, _LEAST_MEMORY = 0.02, 2**20  # share of the features, and bytes, that these may take; two are always kept
_ORDINARY = 1e12  # norms between 1 / this and this: sums of their products stay in the range of float32


class Sweep:
    """Evaluates rows for all steps of a path at once, and keeps what may win or tie.

    Features of up to float32 are multiplied in float32, a row's error being below γ‖f_j‖‖M U‖; whatever is within that
    of the limit is multiplied again in float64. Once a row is found that certainly beats the predicted pick, later
    steps are no longer looked at.

    Args:
        pool: The rows; their scratch is used while `evaluate` runs.
        path: The steps.
        alone: q_j − b_j [n], float64; infinite for rows that are out.
        keys: The order [n] in which ties are resolved.
        dtype: Of the first products, from `sweep_dtype`.
        count: Rows that will be evaluated.
    """

    def __init__(self, pool: Factors, path: Path, alone: Tensor, keys: Tensor, dtype: torch.dtype, count: int) -> None:
        assert pool.features is not None
        self._features, self._values, self._alone, self._keys = pool.features, pool.values, alone, keys
        self._path, self._steps, self._found = path, len(path), [alone.new_empty(0, 6)]
        r = pool.features.shape[1]
        vectors = torch.cat([path.directions[-1:], path.directions[:-1]])  # the new reference first
        scale = vectors.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        self._vectors, self._scale = (vectors / scale).T.to(dtype), scale
        self._sizes = vectors.norm(dim=1)
        unit = torch.finfo(dtype).eps / 2
        # one for each sum and product of a term, two for rounding the vectors; the last part for what underflows
        self._relative = 1.01 * unit * (min(r, _COLUMNS) + math.ceil(r / _COLUMNS) + 4) * (self._sizes + 1e-20 * scale)
        scratch = (pool if pool.scratch is not None else pool.with_scratch()).scratch
        assert scratch is not None
        self._room = scratch.flatten().view(dtype)
        self.rows_at_a_time = len(self._room) // min(r, _COLUMNS)
        room = max(_MEMORY * pool.features.nbytes, _LEAST_MEMORY) / (alone.element_size() * max(count, 1))
        kept = max(1, min(_KEPT, int(room) - 1))
        self.kept_steps = [len(path), *range(0, self._steps, -(-self._steps // kept))]

    def evaluate(self, rows: Tensor, norms: Tensor, errors: Tensor) -> Tensor:
        """Lower ends of the scores before each of the `kept_steps` [rows, kept], float64; what may win is kept.

        Those of steps that are no longer looked at are infinite.

        Args:
            rows: Increasing row numbers.
            norms: Upper ends [rows] of ‖f_j‖, float64, not far below the largest of the pool.
            errors: Rounding errors [rows] of q − b, float64.
        """
        scores = self._products(rows).double() * self._scale + self._alone[rows, None]
        tied = errors[:, None] + ROUNDING * norms[:, None] * self._sizes[: scores.shape[1]]
        lowest = scores - norms[:, None] * self._relative[: scores.shape[1]] - tied
        may_win = ~(lowest[:, 1:] > self._path.limits[: self._steps])
        near = may_win.any(dim=1).nonzero().flatten()
        size = max(1, self.rows_at_a_time // 4)
        for start in range(0, len(near), size):
            part = near[start : start + size]
            self._keep(rows[part], tied[part, 1:])
        kept: Tensor = lowest.new_full((len(rows), len(self.kept_steps)), torch.inf)
        kept[:, 0] = lowest[:, 0]
        for place, step in enumerate(self.kept_steps[1:], 1):
            if step + 1 < lowest.shape[1]:
                kept[:, place] = lowest[:, step + 1]
        return kept

    def found(self) -> Tensor:
        """What may win or tie at each step, up to one that is known to be mispredicted, [e, 6], float64.

        Columns: step, row, key, b, score, error of the score. Rows of a larger key that cannot win a tie are left out.
        """
        found = torch.cat(self._found)
        return found[found[:, 0] < self._steps]

    def _products(self, rows: Tensor) -> Tensor:
        """⟨f_j, w⟩ / scale [rows, 1 + steps]."""
        start, stop = int(rows[0]), int(rows[-1]) + 1
        whole = slice(start, stop) if stop - start == len(rows) else rows
        vectors = self._vectors[:, : 1 + self._steps]
        products = vectors.new_zeros(len(rows), vectors.shape[1])
        for column in range(0, len(vectors), _COLUMNS):
            part = slice(column, column + _COLUMNS)
            block = self._features[:, part][whole]
            converted = self._room[: block.numel()].view(block.shape).copy_(block)
            products.addmm_(converted, vectors[part])
        return products

    def _keep(self, rows: Tensor, errors: Tensor) -> None:
        steps, keys = self._steps, self._keys[rows]
        order = keys.argsort()
        rows, keys, errors = rows[order], keys[order], errors[order, :steps]
        scores = self._features[rows].double() @ self._path.directions[:steps].T + self._alone[rows, None]
        here = (keys[:, None] == self._path.keys[:steps]).int()
        scores[(here.cumsum(dim=1) - here).bool()] = torch.inf  # picked at an earlier step
        low, high = scores - errors, scores + errors
        # by key: a row that is no better than one of a smaller key neither wins nor ties, unless it sets the limit
        before = low.cummin(dim=0).values.roll(1, dims=0)
        before[0] = torch.inf
        kept = (low < before) | (high == high.min(dim=0).values)
        kept &= ~(low > self._path.limits[:steps]) & scores.isfinite()
        place, step = kept.nonzero(as_tuple=True)
        columns = (step, rows[place], keys[place], self._values[rows[place]], scores[kept], errors[kept])
        self._found.append(torch.stack([column.double() for column in columns], dim=1))
        beaten = (high < self._path.floors[:steps]).any(dim=0).nonzero().flatten()
        self._steps = min([steps, *(beaten + 1).tolist()])


def sweep_dtype(features: Tensor, largest: float) -> torch.dtype:
    """float32 where its products are as precise as they should be and in its range, float64 otherwise.

    Args:
        features: F.
        largest: Largest norm of a row.
    """
    small = features.dtype in (torch.float32, torch.float16, torch.bfloat16)
    precise = torch.get_float32_matmul_precision() == "highest"
    return torch.float32 if small and precise and 1 / _ORDINARY < largest < _ORDINARY else torch.float64
