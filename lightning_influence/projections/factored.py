"""A projection as precise as a dense random one that works on the factors of a gradient."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

import torch
from torch import Tensor

from lightning_influence.capture.budget import at_once
from lightning_influence.capture.component import Component
from lightning_influence.capture.contexts import full_precision
from lightning_influence.capture.record import FactoredRecord, IndexedRecord, LayerRecord, SumRecord
from lightning_influence.projections.base import Projection, generator, matrix_shape, pieces
from lightning_influence.projections.fold import Fold, random_signs

PIECE = 2**20  # elements of one intermediate, so that it is still in the cache when it is read again
BLOCK = 2**20  # random signs drawn at a time, 4 MiB; more only where one row of the folded gradient is longer

Rows = Callable[[int, int], Tensor]  # (start, stop) -> those rows of the folded gradients, [n, stop - start, w], anew


class FactoredProjection(Projection):
    """A CountSketch of the whole gradient, computed through small factors; the gradient is never formed.

    For ``g = sum_t s_t a_t^T`` both factors are folded to at most m k_c buckets, ``z = sum_t s'_t a'_t^T`` is summed
    up there, and its entries are added with independent random signs into k_c buckets. Every weight of the layer
    thus ends in one bucket with one sign: inner products are unbiased without any scaling.

    The variance of an inner product is ``(|g|^2 |g'|^2 + <g, g'>^2) / k_c``, which is that of a dense Gaussian
    projection, plus ``(|g^T g'|^2 + |g g'^T|^2 + ...) / (m k_c)`` from the folds: at most 2 / m of the first (for
    gradients of rank one), and nothing once m k_c reaches the sides of the layer. A Kronecker-structured projection
    (`LoGra`) of equal size has that second term with k_in and k_out, the square root of k_c, in place of m k_c.

    Cost for an example of t positions: t (i + o) additions and t (m k_c)^2 multiplications, where materialising and
    projecting takes t i o + k_c i o, and the random numbers are (m k_c)^2 signs instead of k_c i o.

    Args:
        dimensions: As in `Projection`.
        oversampling: m.
        seed: As in `Projection`.
        memory_budget: As in `Projection`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        dimensions: int | float,
        *,
        oversampling: int = 8,
        seed: int = 0,
        memory_budget: int = 256 * 1024**2,
    ) -> None:
        super().__init__(dimensions, seed=seed, memory_budget=memory_budget)
        if isinstance(oversampling, bool) or not isinstance(oversampling, int) or oversampling < 1:
            raise ValueError(f"`FactoredProjection(oversampling={oversampling!r})`: expected an int >= 1.")
        self.oversampling = oversampling

    def settings(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {**super().settings(), "oversampling": self.oversampling}

    @full_precision()
    def project(self, component: Component, record: LayerRecord) -> Tensor:
        """[n, k_c]."""
        size = self.size_of(component)
        left, right = self._folds(component, record.device)
        height, width = len(left.order), len(right.order)
        shape, elements = matrix_shape(component), min(height * width, BLOCK) + _elements(record, height, width)
        parts = pieces(record, elements, at_once(PIECE, record.device))
        return torch.cat([self._sketch(component, _folded(part, left, right, shape), size) for part in parts])

    def buckets(self, component: Component) -> tuple[int, int]:
        """Sides of the folded gradient: of the outputs and of the inputs.

        Row r and column c of it go to bucket (r * width + c) mod k_c; with the width prime to k_c and both in random
        order, any two entries meet with probability 1 / k_c.
        """
        size = self.size_of(component)
        rows, columns = matrix_shape(component)
        if size >= component.numel:
            return rows, columns
        width = min(columns, self.oversampling * size)
        while gcd(width, size) > 1:
            width += 1
        return min(rows, self.oversampling * size), width

    def _folds(self, component: Component, device: torch.device) -> tuple[Fold, Fold]:
        sides = zip(("outputs", "inputs"), matrix_shape(component), self.buckets(component), strict=True)
        left, right = (self._fold(component, side, d, b, device) for side, d, b in sides)
        return left, right

    def _fold(self, component: Component, side: str, size: int, buckets: int, device: torch.device) -> Fold:
        seed = self._seed_of(component, side)
        num_bytes = 4 * size + 8 * buckets
        key = (component.name, side, device)
        return self._keep(key, num_bytes, lambda: Fold.draw(size, buckets, seed, device))

    def _signs(self, component: Component, block: int, count: int, device: torch.device) -> Tensor:
        seed = self._seed_of(component, "signs", block)
        key = (component.name, block, device)
        return self._keep(key, 4 * count, lambda: random_signs(count, generator(seed)).to(device))

    def _sketch(self, component: Component, parts: list[Rows], size: int) -> Tensor:
        """Entries of the folded gradients into buckets, a block of rows at a time."""
        height, width = self.buckets(component)
        step = max(1, BLOCK // width)
        total: Tensor | None = None
        for block, start in enumerate(range(0, height, step)):
            stop = min(height, start + step)
            entries = parts[0](start, stop)
            for rows in parts[1:]:
                entries = entries + rows(start, stop)
            signs = self._signs(component, block, (stop - start) * width, entries.device)
            found = _wrapped(entries.flatten(1).mul_(signs.to(entries.dtype)), size)
            found = found.roll(start * width % size, dims=1)
            total = found if total is None else total + found
        assert total is not None
        return total


def _wrapped(values: Tensor, size: int) -> Tensor:
    """[n, e] -> [n, size]: the sum of the values whose positions agree modulo ``size``."""
    turns, rest = divmod(values.shape[1], size)
    whole = turns * size
    out = values[:, :whole].reshape(len(values), turns, size).sum(1)
    out[:, :rest] += values[:, whole:]
    return out


def _elements(record: LayerRecord, height: int, width: int) -> int:
    """Numbers that an example takes while it is folded."""
    if isinstance(record, SumRecord):
        return sum(_elements(part, height, width) for part in record.parts)
    if isinstance(record, (FactoredRecord, IndexedRecord)):
        return record.gradients.shape[1] * (height + width)
    return 2 * record.example_numel


def _folded(record: LayerRecord, left: Fold, right: Fold, shape: tuple[int, int]) -> list[Rows]:
    """The folded gradients, to be had by rows and to be added up."""
    if isinstance(record, SumRecord):
        return [rows for part in record.parts for rows in _folded(part, left, right, shape)]
    if isinstance(record, FactoredRecord):
        outputs, inputs = left(record.gradients), right(record.inputs)
        return [lambda start, stop: torch.bmm(outputs[:, :, start:stop].mT, inputs)]
    if isinstance(record, IndexedRecord):
        return [_scattered(record, left, right)]
    gradients = record.example_gradients().reshape(len(record), *shape)
    both = left(right(gradients).mT).mT
    return [lambda start, stop: both[:, start:stop]]


def _scattered(record: IndexedRecord, left: Fold, right: Fold) -> Rows:
    """Rows of a table: each position adds to the bucket of the row that it looked up."""
    n = len(record)
    places = left.places()[record.indices]
    values = right(record.gradients) * left.signs[record.indices].unsqueeze(-1).to(record.gradients.dtype)

    def rows(start: int, stop: int) -> Tensor:
        height = stop - start + 1  # the last row takes what belongs to other blocks
        inside = torch.where((places >= start) & (places < stop), places - start, height - 1)
        target = inside + height * torch.arange(n, device=places.device)[:, None]
        out = values.new_zeros(n * height, values.shape[2]).index_add_(0, target.flatten(), values.flatten(0, 1))
        return out.reshape(n, height, -1)[:, :-1]

    return rows
