"""Per-example gradients of one component for one batch, kept in the form that is cheapest to work with.

A linear layer's gradient is a sum of outer products over positions, so inner products, norms and contractions
can be had from its factors. Every method here picks the factored or the materialised way by counting
multiplications; both give the same numbers, and neither is touched by autocast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from lightning_influence.capture.budget import at_once
from lightning_influence.capture.contexts import full_precision

# Elements of one intermediate: 16 MiB of float32, small against a batch's activations, large for a matmul.
CHUNK = 4 * 1024 * 1024
TALL = 256  # examples in one product with given matrices, as far as there is room


class LayerRecord(ABC):
    """Gradients g_i of n examples for one component, shape [n, *component.shape].

    Attributes:
        ids: Ids of the examples, int64 [n].
    """

    ids: Tensor

    def __len__(self) -> int:
        """Number of examples n."""
        return len(self.ids)

    @abstractmethod
    def example_gradients(self) -> Tensor:
        """All gradients, [n, *component.shape], float32 (float64 for a float64 model)."""

    @abstractmethod
    def narrow(self, start: int, stop: int) -> LayerRecord:
        """The record of examples start..stop-1."""

    @property
    @abstractmethod
    def example_numel(self) -> int:
        """Size of one example's gradient."""

    @property
    def device(self) -> torch.device:
        """Where the gradients are; ids stay on the CPU."""
        return self.narrow(0, 1).example_gradients().device

    def joined(self, other: LayerRecord) -> LayerRecord:
        """The record of the sums of both records' gradients, for a component that was used twice."""
        return SumRecord(self.ids, (self, other))

    def chunks(self) -> Sequence[LayerRecord]:
        """The record in pieces of about equal size whose materialised gradients stay small, see `at_once`."""
        n = len(self)
        # Rounded, so that a batch which is a little too large does not leave a piece of one example over.
        step = -(-n // max(1, round(n * self.example_numel / at_once(CHUNK, self.device))))
        return [self.narrow(k, min(k + step, n)) for k in range(0, n, max(1, step))]

    @full_precision()
    def contract(self, gradients: Tensor) -> Tensor:
        """Inner products of given matrices with every example: [q, *component.shape] -> [q, n]."""
        left = gradients.flatten(1)
        return torch.cat([left @ part.example_gradients().flatten(1).mT for part in self.chunks()], dim=1)

    @full_precision()
    def dot_products(self, other: LayerRecord) -> Tensor:
        """Inner products with the examples of another record of the same component, [n, m]."""
        parts = [other.contract(part.example_gradients()) for part in self.chunks()]
        return torch.cat(parts)

    @full_precision()
    def squared_norms(self) -> Tensor:
        """Squared Euclidean norm of each example's gradient, [n]."""
        return torch.cat([part.example_gradients().flatten(1).square().sum(1) for part in self.chunks()])


@dataclass(frozen=True)
class FactoredRecord(LayerRecord):
    """``g = sum_t gradients_t inputs_t^T`` with shape (o, i).

    Attributes:
        ids: [n].
        inputs: What the layer multiplied, [n, t, i], with a column of ones for a bias.
        gradients: Gradient of each example's loss with respect to the layer's output, [n, t, o].
        mask: Positions that belong to the example, bool [n, t]; None for all. The gradient itself needs no
            mask (output gradients are zero elsewhere), second moments of the inputs do.
    """

    ids: Tensor
    inputs: Tensor
    gradients: Tensor
    mask: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(n, t, i, o)."""
        n, t, i = self.inputs.shape
        return n, t, i, self.gradients.shape[2]

    @property
    def device(self) -> torch.device:
        """Of its tensors."""
        return self.gradients.device

    @property
    def example_numel(self) -> int:
        """o * i."""
        return self.inputs.shape[2] * self.gradients.shape[2]

    def narrow(self, start: int, stop: int) -> FactoredRecord:
        """Examples start..stop-1."""
        mask = None if self.mask is None else self.mask[start:stop]
        return FactoredRecord(self.ids[start:stop], self.inputs[start:stop], self.gradients[start:stop], mask)

    @full_precision()
    def example_gradients(self) -> Tensor:
        """[n, o, i]."""
        return torch.bmm(self.gradients.mT, self.inputs)

    @full_precision()
    def contract(self, gradients: Tensor) -> Tensor:
        """[q, o, i] -> [q, n]: s^T (V a) for one position or one matrix, else through the small g = sum s a^T."""
        n, t, i, o = self.sizes
        q = len(gradients)
        if q * t > q + t:
            return super().contract(gradients)
        room = at_once(CHUNK, self.device) // max(1, t * o)
        step = max(1, min(n, TALL, room))
        pieces = torch.split(gradients, max(1, room // step))  # fewer matrices at a time, rather than fewer examples
        parts = []
        for part in (self.narrow(k, min(k + step, n)) for k in range(0, n, step)):
            inputs = part.inputs.reshape(-1, i)
            moved = ((inputs @ p.reshape(len(p) * o, i).mT).reshape(len(part), t, len(p), o) for p in pieces)
            parts.append(torch.cat([torch.einsum("ntqo,nto->qn", one, part.gradients) for one in moved]))
        return torch.cat(parts, dim=1)

    @full_precision()
    def dot_products(self, other: LayerRecord) -> Tensor:
        """[n, m]: sum over t, t' of (a_t . a'_t')(s_t . s'_t') when positions are few ([SP] A.2)."""
        if isinstance(other, IndexedRecord | SumRecord):
            return other.dot_products(self).mT
        if not isinstance(other, FactoredRecord):
            return super().dot_products(other)
        n, t, i, o = self.sizes
        m, u = other.inputs.shape[:2]
        if n * m * t * u * (i + o) >= (n * t + m * u + n * m) * i * o:
            return super().dot_products(other)
        step = max(1, at_once(CHUNK, self.device) // max(1, t * m * u))
        parts = []
        for part in (self.narrow(k, min(k + step, n)) for k in range(0, n, step)):
            inner = part.inputs.reshape(-1, i) @ other.inputs.reshape(-1, i).mT
            inner *= part.gradients.reshape(-1, o) @ other.gradients.reshape(-1, o).mT
            parts.append(inner.reshape(len(part), t, m, u).sum((1, 3)))
        return torch.cat(parts)

    @full_precision()
    def squared_norms(self) -> Tensor:
        """[n], from t x t Gram matrices when those are smaller than the gradient."""
        _, t, i, o = self.sizes
        if t * (i + o) >= i * o:
            return super().squared_norms()
        grams = torch.bmm(self.inputs, self.inputs.mT)
        grams *= torch.bmm(self.gradients, self.gradients.mT)
        return grams.sum((1, 2))

    def joined(self, other: LayerRecord) -> LayerRecord:
        """The same layer called twice: its positions follow one another."""
        if not isinstance(other, FactoredRecord):
            return super().joined(other)
        masks = [p.mask if p.mask is not None else p.inputs.new_ones(p.inputs.shape[:2]).bool() for p in (self, other)]
        return FactoredRecord(
            self.ids,
            torch.cat([self.inputs, other.inputs], dim=1),
            torch.cat([self.gradients, other.gradients], dim=1),
            None if self.mask is None and other.mask is None else torch.cat(masks, dim=1),
        )


@dataclass(frozen=True)
class IndexedRecord(LayerRecord):
    """Embedding: row ``indices_t`` of the weight received ``gradients_t``; shape (V, d).

    Attributes:
        ids: [n].
        indices: Looked-up rows, int64 [n, t].
        gradients: [n, t, d], zero where nothing flows (padding).
        rows: V.
    """

    ids: Tensor
    indices: Tensor
    gradients: Tensor
    rows: int

    @property
    def device(self) -> torch.device:
        """Of its tensors."""
        return self.gradients.device

    @property
    def example_numel(self) -> int:
        """V * d."""
        return self.rows * self.gradients.shape[2]

    def narrow(self, start: int, stop: int) -> IndexedRecord:
        """Examples start..stop-1."""
        return replace(
            self,
            ids=self.ids[start:stop],
            indices=self.indices[start:stop],
            gradients=self.gradients[start:stop],
        )

    def example_gradients(self) -> Tensor:
        """[n, V, d]: large; the methods below avoid it where they can."""
        n, _, d = self.gradients.shape
        out = self.gradients.new_zeros(n, self.rows, d)
        return out.scatter_add_(1, self.indices.unsqueeze(-1).expand_as(self.gradients), self.gradients)

    @full_precision()
    def contract(self, gradients: Tensor) -> Tensor:
        """[q, V, d] -> [q, n]: only the looked-up rows matter."""
        q, t, d = len(gradients), *self.gradients.shape[1:]
        step = max(1, at_once(CHUNK, self.device) // max(1, q * t * d))
        parts = []
        for part in (self.narrow(k, min(k + step, len(self))) for k in range(0, len(self), step)):
            picked = gradients[:, part.indices.reshape(-1)].reshape(q, len(part), t * d)
            parts.append(torch.einsum("qnk,nk->qn", picked, part.gradients.flatten(1)))
        return torch.cat(parts, dim=1)

    @full_precision()
    def dot_products(self, other: LayerRecord) -> Tensor:
        """[n, m]: over pairs of positions that looked up the same row, when those are few."""
        if isinstance(other, FactoredRecord):
            return self._with_factors(other)
        if not isinstance(other, IndexedRecord):
            return super().dot_products(other)
        (_, t, _), (m, u, _) = self.gradients.shape, other.gradients.shape
        if t * m * u >= self.rows + m * u:
            return super().dot_products(other)
        rows = []
        for part in (self.narrow(k, k + 1) for k in range(len(self))):
            same = part.indices.reshape(-1, 1, 1) == other.indices
            inner = torch.einsum("td,mud->tmu", part.gradients[0], other.gradients)
            rows.append((inner * same).sum((0, 2)))
        return torch.stack(rows)

    def _with_factors(self, other: FactoredRecord) -> Tensor:
        """[n, m] with the head of a tied embedding: sum over t, t' of s'_t'[index_t] (a'_t' . g_t)."""
        m, u, v = other.gradients.shape
        rows = []
        for part in (self.narrow(k, k + 1) for k in range(len(self))):
            inner = torch.einsum("td,mud->mut", part.gradients[0], other.inputs)
            rows.append(
                (inner * other.gradients.reshape(m * u, v)[:, part.indices[0]].reshape(inner.shape)).sum((1, 2))
            )
        return torch.stack(rows)

    @full_precision()
    def squared_norms(self) -> Tensor:
        """[n]."""
        same = self.indices.unsqueeze(2) == self.indices.unsqueeze(1)
        return (torch.bmm(self.gradients, self.gradients.mT) * same).sum((1, 2))

    def joined(self, other: LayerRecord) -> LayerRecord:
        """The same table looked up twice."""
        if not isinstance(other, IndexedRecord):
            return super().joined(other)
        indices = torch.cat([self.indices, other.indices], dim=1)
        return replace(self, indices=indices, gradients=torch.cat([self.gradients, other.gradients], dim=1))


@dataclass(frozen=True)
class DenseRecord(LayerRecord):
    """Gradients as they are, for small parameters and layers without structure: values [n, *shape]."""

    ids: Tensor
    values: Tensor

    @property
    def device(self) -> torch.device:
        """Of its values."""
        return self.values.device

    @property
    def example_numel(self) -> int:
        """Product of the shape."""
        return self.values[0].numel()

    def narrow(self, start: int, stop: int) -> DenseRecord:
        """Examples start..stop-1."""
        return DenseRecord(self.ids[start:stop], self.values[start:stop])

    def example_gradients(self) -> Tensor:
        """The values."""
        return self.values

    def joined(self, other: LayerRecord) -> LayerRecord:
        """Sum of the values."""
        return (
            DenseRecord(self.ids, self.values + other.values)
            if isinstance(other, DenseRecord)
            else super().joined(other)
        )


@dataclass(frozen=True)
class SumRecord(LayerRecord):
    """Tied parameters: the gradient is the sum of the parts' gradients."""

    ids: Tensor
    parts: tuple[LayerRecord, ...]

    @property
    def device(self) -> torch.device:
        """Of the parts."""
        return self.parts[0].device

    @property
    def example_numel(self) -> int:
        """That of any part."""
        return self.parts[0].example_numel

    def narrow(self, start: int, stop: int) -> SumRecord:
        """Examples start..stop-1."""
        return SumRecord(self.ids[start:stop], tuple(p.narrow(start, stop) for p in self.parts))

    def example_gradients(self) -> Tensor:
        """Sum of the parts, [n, *shape]."""
        total = self.parts[0].example_gradients()
        for part in self.parts[1:]:
            total = total + part.example_gradients()
        return total

    def contract(self, gradients: Tensor) -> Tensor:
        """Linear, so part by part."""
        return torch.stack([part.contract(gradients) for part in self.parts]).sum(0)

    def dot_products(self, other: LayerRecord) -> Tensor:
        """Linear in both, so part by part: a table of the vocabulary's size is not formed for it."""
        rights = other.parts if isinstance(other, SumRecord) else (other,)
        return torch.stack([left.dot_products(right) for left in self.parts for right in rights]).sum(0)

    def squared_norms(self) -> Tensor:
        """[n], example by example."""
        alone = (self.narrow(k, k + 1) for k in range(len(self)))
        return torch.cat([one.dot_products(one)[0] for one in alone])


def merged(records: Sequence[LayerRecord]) -> LayerRecord:
    """One record for all calls and uses of a component in a batch."""
    return reduce(lambda left, right: left.joined(right), records)
