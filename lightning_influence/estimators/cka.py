"""Similarity of gradients as representations: centred kernel alignment, component by component."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.capture import Component, ExampleLoader, LayerRecord
from lightning_influence.capture.component import Select
from lightning_influence.capture.contexts import full_precision
from lightning_influence.capture.record import CHUNK
from lightning_influence.estimators.base import Estimator, Labels, Loss


class CKA(Estimator):
    """Linear CKA of the query's and the example's gradient, summed over components (Kornblith et al. 2019, section 3).

    A component's gradient is a matrix X [o, i], a row for each output. With X_c its columns centred over the rows,
    ``CKA(X, Y) = |Y_c^T X_c|_F^2 / (|X_c^T X_c|_F |Y_c^T Y_c|_F)``: between 0 and 1 in each component, the same for
    gradients of any length (``normalise`` changes nothing), for rotated inputs, and for a gradient and its negative.
    A baseline of [MS] section 5 that tells alike from unlike examples; helpful and harmful ones both score above 0.

    Normalisation layers have a row for each channel and a column for each parameter; parameters without a matrix are
    one column. A gradient that is the same in every row, or none, has alignment 0 with everything.

    Cost: o² multiplications for a pair and o² i for an example, or o i² for a pair where that is less or o is too large
    for a matrix o². Arguments are those of `Estimator`.
    """

    formula = "sum over components of CKA(g_q, g_i)"
    bilinear = False

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = None,
        components: Select | list[Component] = None,
        *,
        normalise: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, loss, components, **options)

    def transform(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As they are: centred and scaled already, [q, rows, columns]."""
        return dict(gradients)

    def _records(
        self, loader: ExampleLoader, what: str, labels: Labels = "data", seed: int = 0, loss: Loss = None
    ) -> Iterator[Iterator[tuple[Component, LayerRecord]]]:
        for records in super()._records(loader, what, labels, seed, loss):
            yield ((c, AlignedRecord(r.ids, c, r)) for c, r in records)


@dataclass(frozen=True)
class AlignedRecord(LayerRecord):
    """Gradients as the matrices X_c / sqrt(|X_c^T X_c|_F), whose alignment is ``|Y^T X|_F^2``.

    Attributes:
        ids: [n].
        component: Of the gradients.
        record: The gradients.
    """

    ids: Tensor
    component: Component
    record: LayerRecord

    @property
    def device(self) -> torch.device:
        """Of the gradients."""
        return self.record.device

    @property
    def example_numel(self) -> int:
        """Size of the gradient."""
        return self.record.example_numel

    def narrow(self, start: int, stop: int) -> AlignedRecord:
        """Examples start..stop-1."""
        return AlignedRecord(self.ids[start:stop], self.component, self.record.narrow(start, stop))

    @full_precision()
    def example_gradients(self) -> Tensor:
        """[n, rows, columns]."""
        return aligned(_matrices(self.component, self.record.example_gradients()))

    @full_precision()
    def contract(self, gradients: Tensor) -> Tensor:
        """Alignment of given matrices with every example: [q, rows, columns] -> [q, n]."""
        q, rows, columns = gradients.shape
        parts: Sequence[LayerRecord] = self.chunks()
        if _by_kernels(q, len(self), rows, columns):
            kernels = _kernels(gradients)
            return torch.cat([kernels @ _kernels(part.example_gradients()).mT for part in parts], dim=1)
        flat = gradients.mT.reshape(-1, rows)  # [q * columns, rows]
        found = [(flat @ one).reshape(q, -1).square().sum(1) for part in parts for one in part.example_gradients()]
        return torch.stack(found, dim=1)


def _by_kernels(q: int, n: int, rows: int, columns: int) -> bool:
    """Whether <X X^T, Y Y^T> takes fewer multiplications than |Y^T X|^2, and the kernels not much memory."""
    kernels = (q + n) * rows**2 * columns + q * n * rows**2
    return rows <= columns or (rows**2 <= CHUNK and kernels <= q * n * rows * columns**2)


def aligned(matrices: Tensor) -> Tensor:
    """``X_c / sqrt(|X_c^T X_c|_F)`` of matrices [n, rows, columns]; 0 where all rows are the same.

    >>> x = aligned(torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]]))
    >>> round(float((x[0].T @ x[0]).square().sum()), 5)
    1.0
    """
    largest = matrices.abs().amax((1, 2), keepdim=True)  # whose square may not be representable
    matrices = matrices / torch.where(largest > 0, largest, 1)
    centred = matrices - matrices.mean(1, keepdim=True)
    lengths, before = centred.flatten(1).norm(dim=1), matrices.flatten(1).norm(dim=1)
    varied = lengths > 16 * torch.finfo(matrices.dtype).eps * before  # what is left of equal rows is rounding
    units = centred / torch.where(varied, lengths, 1)[:, None, None]
    short = units if units.shape[1] <= units.shape[2] else units.mT
    scale = torch.bmm(short, short.mT).flatten(1).norm(dim=1).sqrt()
    return units * torch.where(varied, 1 / torch.where(varied, scale, 1), 0)[:, None, None]


def _matrices(component: Component, gradients: Tensor) -> Tensor:
    """[n, *shape] -> [n, rows, columns]."""
    if gradients.dim() < 3:
        return gradients.reshape(len(gradients), -1, 1)
    return gradients.flatten(2).mT if component.kind == "norm" else gradients.flatten(2)


def _kernels(matrices: Tensor) -> Tensor:
    """X X^T, flat, [n, rows²]."""
    return torch.bmm(matrices, matrices.mT).flatten(1)
