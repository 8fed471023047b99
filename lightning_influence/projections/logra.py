"""Projection of the two factors of a gradient, each by a matrix of its own (Choe et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_influence.capture.budget import at_once
from lightning_influence.capture.component import Component
from lightning_influence.capture.contexts import full_precision
from lightning_influence.capture.record import CHUNK, FactoredRecord, IndexedRecord, LayerRecord, SumRecord
from lightning_influence.projections.base import Projection, generator, matrix_shape, pieces

BLOCK = 2**22  # random numbers drawn at a time, 16 MiB


class LoGra(Projection):
    """``P_out g P_in^T = sum_t (P_out s_t)(P_in a_t)^T``, flattened: [k_out, k_in] numbers for a component.

    [IA] App. D.3. Entries of P_out [k_out, o] are drawn from N(0, 1 / k_out), those of P_in [k_in, i] from
    N(0, 1 / k_in), so that inner products are unbiased; a side that would not shrink stays as it is.

    The Fisher matrix of such vectors and a projected model (a pair of small layers beside the large one) have this
    form. For inner products alone `FactoredProjection` is the better choice: the variance here is about
    ``(|g^T g'|^2 + |g g'^T|^2) / sqrt(k_c)`` for gradients of low rank, there it goes with ``1 / k_c``.

    Args:
        dimensions: As in `Projection`: k_in k_out is the largest product of two numbers that differ little and
            does not exceed the component's part. Or a pair ``(k_out, k_in)`` that every component gets, as in the
            original; a side shorter than that is taken whole.
        seed: As in `Projection`.
        memory_budget: As in `Projection`.

    Attributes:
        given: Matrices that took the place of random ones, by component and side; forgotten by `start`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, dimensions: int | float | Sequence[int], *, seed: int = 0, memory_budget: int = 256 * 1024**2
    ) -> None:
        super().__init__(dimensions, seed=seed, memory_budget=memory_budget)
        self.sides: dict[str, tuple[int, int]] = {}
        self.given: dict[tuple[str, str], Tensor] = {}

    def start(self, components: Sequence[Component]) -> Self:
        """Share the dimensions out, forgetting matrices that were given.

        Raises:
            ValueError: As `Projection.start`.
        """
        self.given = {}
        return super().start(components)

    def give(self, component: Component, side: str, matrix: Tensor) -> None:
        """Put a matrix [k, d] in the place of the random one of a side, such as leading eigenvectors of its moments.

        Raises:
            ValueError: If its shape is not that of the side.
        """
        self.size_of(component)
        which = ("outputs", "inputs").index(side)
        shape = (self.sides[component.name][which], matrix_shape(component)[which])
        if tuple(matrix.shape) != shape:
            raise ValueError(
                f"`LoGra.give({component.name!r}, {side!r})`: expected a matrix {list(shape)}. "
                f"Got {list(matrix.shape)}."
            )
        self.given[component.name, side] = matrix

    def _check_dimensions(self, dimensions: Any) -> None:
        if not isinstance(dimensions, (list, tuple)):
            super()._check_dimensions(dimensions)
        elif len(dimensions) != 2 or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in dimensions):
            raise ValueError(
                f"`LoGra(dimensions={dimensions!r})`: expected a pair (k_out, k_in) of ints >= 1 for every component, "
                "an int for all of them together, or a share of the parameters."
            )

    def _allocate(self, components: Sequence[Component]) -> dict[str, int]:
        shapes = {c.name: matrix_shape(c) for c in components}
        if isinstance(self.dimensions, (list, tuple)):
            k_out, k_in = self.dimensions
            self.sides = {name: (min(k_out, o), min(k_in, i)) for name, (o, i) in shapes.items()}
        else:
            sizes = super()._allocate(components)
            self.sides = {name: split(sizes[name], *shape) for name, shape in shapes.items()}
        return {name: k_out * k_in for name, (k_out, k_in) in self.sides.items()}

    @full_precision()
    def project(self, component: Component, record: LayerRecord) -> Tensor:
        """[n, k_out k_in]."""
        self.size_of(component)
        o, i = matrix_shape(component)
        parts = pieces(record, _elements(record, o + i), at_once(CHUNK, record.device))
        return torch.cat([self._projected(component, part).flatten(1) for part in parts])

    def _projected(self, component: Component, record: LayerRecord) -> Tensor:
        """[n, k_out, k_in]."""
        if isinstance(record, SumRecord):
            return torch.stack([self._projected(component, part) for part in record.parts]).sum(0)
        if isinstance(record, FactoredRecord):
            outputs = self._reduced(component, "outputs", record.gradients)
            return torch.bmm(outputs.mT, self._reduced(component, "inputs", record.inputs))
        if isinstance(record, IndexedRecord):
            outputs = self._looked_up(component, record.indices, record.gradients)
            return torch.bmm(outputs.mT, self._reduced(component, "inputs", record.gradients))
        gradients = record.example_gradients().reshape(len(record), *matrix_shape(component))
        inner = self._reduced(component, "inputs", gradients)
        return self._reduced(component, "outputs", inner.mT).mT

    def matrix(self, component: Component, side: str) -> Tensor:
        """P_out ("outputs") [k_out, o] or P_in ("inputs") [k_in, i] on the CPU, whole; float32 where it is drawn."""
        self.size_of(component)
        blocks = [block for _, _, block in self._blocks(component, side, torch.device("cpu"))]
        return torch.cat(blocks, dim=1)

    def _blocks(self, component: Component, side: str, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        """Columns start..stop-1 of a side's matrix, a few at a time."""
        which = ("outputs", "inputs").index(side)
        full, size = matrix_shape(component)[which], self.sides[component.name][which]
        if (component.name, side) in self.given:
            yield 0, full, self.given[component.name, side].to(device)
            return
        step = max(1, BLOCK // size)
        for start in range(0, full, step):
            stop = min(full, start + step)
            seed = self._seed_of(component, side, start)

            def draw(start: int = start, stop: int = stop, seed: int = seed) -> Tensor:
                if size == full:
                    return torch.eye(full)[:, start:stop].to(device)
                drawn = torch.randn(size, stop - start, generator=generator(seed))
                return drawn.mul_(size**-0.5).to(device)

            yield start, stop, self._keep((component.name, side, start, device), 4 * size * (stop - start), draw)

    def _reduced(self, component: Component, side: str, vectors: Tensor) -> Tensor:
        """[..., d] -> [..., k]."""
        which = ("outputs", "inputs").index(side)
        if self.sides[component.name][which] == vectors.shape[-1]:
            return vectors
        blocks = self._blocks(component, side, vectors.device)
        return torch.stack([vectors[..., lo:hi] @ block.mT.to(vectors.dtype) for lo, hi, block in blocks]).sum(0)

    def _looked_up(self, component: Component, indices: Tensor, like: Tensor) -> Tensor:
        """Columns of P_out for the rows of a table that were looked up: [n, t] -> [n, t, k_out]."""
        found = like.new_zeros(*indices.shape, self.sides[component.name][0])
        for start, stop, block in self._blocks(component, "outputs", indices.device):
            inside = (indices >= start) & (indices < stop)
            found[inside] = block.mT.to(like.dtype)[indices[inside] - start]
        return found


def split(size: int, rows: int, columns: int) -> tuple[int, int]:
    """(k_out, k_in) with a product of at most ``size``, the longer for the longer side, neither beyond its side.

    >>> split(54, 1536, 576), split(7, 192, 576), split(20, 1, 576)
    ((7, 7), (2, 3), (1, 20))
    """
    short = min(isqrt(size), rows, columns)
    long = min(size // short, max(rows, columns))
    return (long, short) if rows > columns else (short, long)


def _elements(record: LayerRecord, sides: int) -> int:
    """Numbers that an example takes while it is projected."""
    if isinstance(record, SumRecord):
        return sum(_elements(part, sides) for part in record.parts)
    if isinstance(record, (FactoredRecord, IndexedRecord)):
        return record.gradients.shape[1] * sides
    return 2 * record.example_numel
