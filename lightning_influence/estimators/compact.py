"""Gradients of single examples in the form that takes least to keep and to compare with others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_influence.capture.contexts import full_precision
from lightning_influence.capture.record import DenseRecord, FactoredRecord, IndexedRecord, LayerRecord, SumRecord

# A product of two vectors in memory reads two numbers for a multiplication, that of two matrices far fewer; so one of
# the former takes as long as this many of the latter.
READ = 8


@dataclass(frozen=True)
class Shape:
    """What is known of one component's gradients before any is taken, from one example.

    Attributes:
        positions: Positions for each position of the example (1 in a language model), or their number.
        scales: Whether it is the former.
        inputs: i of a factored gradient; 0 for any other form.
        outputs: o of a factored gradient; else the numbers kept for each position.
        sharing: Components that multiply the very same input.
    """

    positions: int
    scales: bool
    inputs: int
    outputs: int
    sharing: int = 1

    @property
    def width(self) -> float:
        """Numbers kept for a position."""
        return self.outputs + self.inputs / self.sharing

    def rows(self, length: float) -> float:
        """Positions of an example of some length."""
        return self.positions * length if self.scales else self.positions

    def worth_multiplying(self, length: float, pairs: float) -> bool:
        """Whether examples of this length are compared faster as matrices, with so many pairs for each of them.

        t i o multiplications for the matrix and i o for a pair, against t² (o + i) for a pair.
        """
        t, matrix = self.rows(length), self.inputs * self.outputs
        return matrix > 0 and t * matrix + READ * pairs * matrix < pairs * t * t * self.width

    def smaller_multiplied(self, positions: float) -> bool:
        """Whether the matrix takes less memory than the factors of so many positions."""
        return 0 < self.inputs * self.outputs <= positions * self.width


def shapes_of(records: Sequence[LayerRecord], length: int, padded: int) -> tuple[Shape, ...]:
    """Shapes of the components from the records of one example.

    Args:
        records: One for each component, n = 1.
        length: Positions of the example.
        padded: The same with its padding; a layer with several positions, but no more than that, is taken to have up
            to one for each.
    """
    inputs = [id(record.inputs) if isinstance(record, FactoredRecord) else None for record in records]
    return tuple(
        _shape(r, length, padded, inputs.count(key) if key else 1) for r, key in zip(records, inputs, strict=True)
    )


def _shape(record: LayerRecord, length: int, padded: int, sharing: int) -> Shape:
    if isinstance(record, FactoredRecord):
        _, t, i, o = record.sizes
        return Shape(1, True, i, o, sharing) if 1 < t <= padded else Shape(t, False, i, o, sharing)
    if isinstance(record, SumRecord):
        parts = [_shape(part, length, padded, 1) for part in record.parts]
        scales = any(part.scales for part in parts)
        width = sum(part.rows(length) * part.width for part in parts) / (length if scales else 1)
        return Shape(1, scales, 0, int(width + 1))
    if isinstance(record, IndexedRecord):
        t, d = record.gradients.shape[1:]
        width = d + 4  # an index takes as much as four numbers of half precision
        return Shape(1, True, 0, width) if 1 < t <= padded else Shape(t, False, 0, width)
    return Shape(1, False, 0, record.example_numel)


@dataclass(frozen=True)
class Kept:
    """One example's gradients: for each component a record of n = 1 without idle positions."""

    records: tuple[LayerRecord, ...]

    @cached_property
    def bytes(self) -> int:
        """Memory taken; an input that several components share counts once."""
        return sum({id(t): t.nbytes for record in self.records for t in _tensors(record)}.values())

    @property
    def device(self) -> torch.device:
        """Where it is kept."""
        return _tensors(self.records[0])[0].device


@dataclass(frozen=True)
class Compactor:
    """Takes the records of batches apart into examples.

    Attributes:
        shapes: Of the components.
        multiplied: Which components are kept as matrices ``Σ s aᵀ`` for every example, and not as factors; others are
            for examples so long that the matrix is smaller.
        dtype: To which what is kept is rounded; None keeps it as it was computed.
    """

    shapes: tuple[Shape, ...]
    multiplied: tuple[bool, ...]
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, shapes: Iterable[Shape], length: float, pairs: float, dtype: torch.dtype | None = None) -> Compactor:
        """For examples of a mean length, and a mean number of pairs for each."""
        shapes = tuple(shapes)
        return cls(shapes, tuple(shape.worth_multiplying(length, pairs) for shape in shapes), dtype)

    def bytes(self, length: int, itemsize: int) -> int:
        """The most memory that an example of some length takes, at so many bytes a number."""
        size = itemsize if self.dtype is None else self.dtype.itemsize
        numbers = 0.0
        for shape, always in zip(self.shapes, self.multiplied, strict=True):
            rows = shape.rows(length)
            whole = always or shape.smaller_multiplied(rows)
            numbers += shape.inputs * shape.outputs if whole else rows * shape.width
        return int(size * numbers) + 1

    @full_precision()
    def take(self, records: Iterable[LayerRecord], rows: Sequence[int] | None = None) -> list[Kept]:
        """The examples of a batch, or some rows of it.

        Args:
            records: One for each component, n examples each.
            rows: None for all.
        """
        inputs = _Inputs(self.dtype)
        columns = [
            self._column(record, shape, always, inputs, rows)
            for record, shape, always in zip(records, self.shapes, self.multiplied, strict=True)
        ]
        return [Kept(example) for example in zip(*columns, strict=True)]

    def _column(
        self, record: LayerRecord, shape: Shape, always: bool, inputs: _Inputs, rows: Sequence[int] | None
    ) -> list[LayerRecord]:
        wanted = range(len(record)) if rows is None else rows
        if isinstance(record, SumRecord):
            parts = [self._column(part, shape, False, inputs, rows) for part in record.parts]
            ids = (record.ids[k : k + 1] for k in wanted)
            return [SumRecord(name, examples) for name, examples in zip(ids, zip(*parts, strict=True), strict=True)]
        if not isinstance(record, FactoredRecord | IndexedRecord):
            alone = ((record.ids[k : k + 1], record.narrow(k, k + 1).example_gradients()) for k in wanted)
            return [DenseRecord(ids, self._rounded(values).clone()) for ids, values in alone]  # a view keeps the batch
        busy = _busy(record.gradients).cpu()
        return [self._example(record, k, busy[k].nonzero().flatten(), shape, always, inputs) for k in wanted]

    def _example(
        self,
        record: FactoredRecord | IndexedRecord,
        k: int,
        busy: Tensor,
        shape: Shape,
        always: bool,
        shared: _Inputs,
    ) -> LayerRecord:
        ids, positions = record.ids[k : k + 1], busy.to(record.gradients.device)
        gradients = record.gradients[k].index_select(0, positions).unsqueeze(0)
        if isinstance(record, IndexedRecord):
            indices = record.indices[k].index_select(0, positions).unsqueeze(0)
            return replace(record, ids=ids, indices=indices, gradients=self._rounded(gradients))
        if always or shape.smaller_multiplied(len(busy)):
            inputs = record.inputs[k].index_select(0, positions).unsqueeze(0)
            return DenseRecord(ids, self._rounded(torch.bmm(gradients.mT, inputs)))
        return FactoredRecord(ids, shared.rows(record.inputs, k, positions, busy), self._rounded(gradients))

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor if self.dtype is None else tensor.to(self.dtype)


@dataclass
class _Inputs:
    """Inputs of single examples, one tensor for all components that multiply the same one at the same positions."""

    dtype: torch.dtype | None
    found: dict[tuple[int, int, bytes], Tensor] = field(default_factory=dict)
    held: dict[int, Tensor] = field(default_factory=dict)  # so that no other tensor gets the id of one seen before

    def rows(self, inputs: Tensor, k: int, positions: Tensor, busy: Tensor) -> Tensor:
        """[1, positions, i] of example k."""
        self.held[id(inputs)] = inputs
        key = (id(inputs), k, busy.numpy().tobytes())
        if key not in self.found:
            rows = inputs[k].index_select(0, positions).unsqueeze(0)
            self.found[key] = rows if self.dtype is None else rows.to(self.dtype)
        return self.found[key]


def _busy(gradients: Tensor) -> Tensor:
    """Positions [n, t] with a gradient, NaN included; nearly all show it in their first numbers, the rest are read."""
    busy = (gradients[..., :16] != 0).any(-1)
    rest = ~busy
    busy[rest] = (gradients[rest] != 0).any(-1)
    return busy


def _tensors(record: LayerRecord) -> list[Tensor]:
    if isinstance(record, FactoredRecord):
        return [record.inputs, record.gradients]
    if isinstance(record, IndexedRecord):
        return [record.indices, record.gradients]
    if isinstance(record, SumRecord):
        return [tensor for part in record.parts for tensor in _tensors(part)]
    assert isinstance(record, DenseRecord)
    return [record.values]
