"""Running sums over the components chosen so far, and the objective of every set one step away."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_influence.selection.component_objective import EVALUATE, Block, Objective, Sums, unit_deviations
from lightning_influence.selection.component_pairs import ComponentPairs

_BLOCK_ON_CPU = 2**19  # numbers: buffers of so many float64 stay in the cache while a dozen operations pass over them
_BLOCK_ELSEWHERE = 2**25


class ComponentSearch:
    """Objective of S ∪ {c} or of S ∖ {c} for all c at once, one block of queries after the other.

    Holds a copy of the products in float64, 8 · (2ck + c) · q bytes, in which the true source comes first and the
    components that can still be taken are kept together. Sums are float64. Work on the CPU needs at most another
    32 · max(2¹⁹, ck) bytes however many queries there are, as a block has at least one query.

    Attributes:
        left: Rows of the components that can still be taken, in the order of the scores.
    """

    def __init__(self, pairs: ComponentPairs, objective: Objective, eps: float = 0.0) -> None:
        self.num_queries = pairs.num_queries
        self.left = list(range(len(pairs.components)))
        c, q, k = pairs.dots.shape
        size = max(1, (_BLOCK_ON_CPU if pairs.dots.device.type == "cpu" else _BLOCK_ELSEWHERE) // (c * max(2, k)))
        buffers = torch.empty(4, c * max(2, k) * min(size, q), dtype=torch.float64, device=pairs.dots.device)
        self._evaluate = EVALUATE[objective]
        starts = range(0, q, size)
        self._blocks = [_Queries(pairs, slice(at, at + size), eps, buffers) for at in starts]

    def alone(self) -> Tensor:
        """Objective of S, [1]; of all components at the start."""
        return self._scores(lambda block: block.of(self.left))

    def values(self, rows: Sequence[int]) -> Tensor:
        """Of some of the components, query by query, [q]; before any was taken. Their mean is the objective."""
        return torch.cat([self._evaluate(block.of(rows), block.block)[0] for block in self._blocks]).double().cpu()

    def with_each(self) -> Tensor:
        """Objective of the taken components and one more, for each of ``left``."""
        return self._scores(lambda block: block.with_each(len(self.left)))

    def without_each(self) -> Tensor:
        """Objective of ``left`` but for one, for each of them."""
        return self._scores(lambda block: block.without_each(len(self.left)))

    def take(self, place: int) -> int:
        """Moves a component from ``left``, by its place there, to those that are taken; returns its row."""
        row = self.left[place]
        last = len(self.left) - 1
        for block in self._blocks:
            block.take(place, last)
        self.left[place] = self.left[last]
        self.left.pop()
        return row

    def _scores(self, sums: Callable[[_Queries], Sums]) -> Tensor:
        """Mean over queries, on the CPU."""
        parts = (self._evaluate(sums(block), block.block) for block in self._blocks)
        total = sum(part.sum(1).double() for part in parts)
        assert isinstance(total, Tensor)
        return total.cpu() / self.num_queries


class _Queries:
    """The products and sums of one block of queries."""

    def __init__(self, pairs: ComponentPairs, own: slice, eps: float, buffers: Tensor) -> None:
        dots, squares, valid = (_source_first(part[..., own, :], pairs.target[own]) for part in _wide(pairs))
        self._rows = (dots, squares, pairs.query_squares[:, own].to(torch.float64, copy=True))
        self._taken = [torch.zeros_like(part[0]) for part in self._rows]
        self._buffers = buffers
        padding = None if bool(valid.all()) else ~valid
        zeros = any(bool((part == 0).any()) for part in self._rows[1:])
        whole = Block(padding, zeros, eps, torch.empty(0))
        self.block = Block(padding, zeros, eps, unit_deviations(self.of(range(len(dots))), whole)[0].clone())

    def of(self, rows: Sequence[int]) -> Sums:
        """Sums over some components as the only set."""
        dots, squares, own = (part[list(rows)].sum(0, keepdim=True) for part in self._rows)
        return Sums(dots, squares, own, torch.empty_like(dots))

    def with_each(self, count: int) -> Sums:
        """What is taken and each of the first ``count`` rows."""
        sums = self._room(count)
        for rows, taken, out in zip(
            self._rows, self._taken, (sums.dots, sums.squares, sums.query_squares), strict=True
        ):
            torch.add(rows[:count], taken, out=out)
        return sums

    def without_each(self, count: int) -> Sums:
        """The first ``count`` rows but for each."""
        sums = self._room(count)
        for rows, out in zip(self._rows, (sums.dots, sums.squares, sums.query_squares), strict=True):
            _all_but_one(rows[:count], out, *(buffer[: out.numel()].view_as(out) for buffer in self._buffers[2:]))
        return sums

    def take(self, place: int, last: int) -> None:
        """Adds a row to what is taken; the last row comes to its place."""
        for rows, taken in zip(self._rows, self._taken, strict=True):
            taken += rows[place]
            rows[place] = rows[last]

    def _room(self, count: int) -> Sums:
        _, k, q = self._rows[0].shape
        dots, squares, spare = (buffer[: count * k * q].view(count, k, q) for buffer in self._buffers[:3])
        return Sums(dots, squares, dots.new_empty(count, q), spare)


def _wide(pairs: ComponentPairs) -> tuple[Tensor, Tensor, Tensor]:
    """Products and mask with at least two columns, so that there is always another candidate, if only padding."""
    missing = (0, max(0, 2 - pairs.dots.shape[2]))
    return pad(pairs.dots, missing), pad(pairs.candidate_squares, missing), pad(pairs.mask, missing, value=False)


def _source_first(values: Tensor, target: Tensor) -> Tensor:
    """[..., q, k] -> [..., k, q] with the target's column first and the others in their order; float64 unless bool."""
    columns = torch.arange(values.shape[-1], device=values.device).expand(len(target), -1)
    order = torch.where(columns == target[:, None], -1, columns).argsort(1)
    moved = values.gather(-1, order.expand(values.shape)).transpose(-1, -2).contiguous()
    return moved if moved.dtype == torch.bool else moved.double()


def _all_but_one(rows: Tensor, out: Tensor, after: Tensor, spare: Tensor) -> None:
    """Sum of all rows but each, from those before and those after: nothing is subtracted, so nothing cancels."""
    out[0] = 0
    torch.cumsum(rows[:-1], 0, out=out[1:])
    backwards = torch.arange(len(rows) - 1, 0, -1, device=rows.device)
    torch.index_select(rows, 0, backwards, out=spare[1:])
    torch.cumsum(spare[1:], 0, out=after[1:])
    torch.index_select(after, 0, backwards, out=spare[:-1])
    out[:-1] += spare[:-1]
