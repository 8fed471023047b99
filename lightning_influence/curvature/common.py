"""What Kronecker-factored blocks have in common: queries, keys and values multiply the same input."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.capture.layers.base import REMEMBERED
from lightning_influence.curvature.base import symmetric

SPLIT = 256  # width of the tiles in which only one half of a symmetric product is computed


@dataclass(frozen=True)
class _Made:
    """Something made of an input; both are kept, so that no other tensor takes their identity.

    Attributes:
        inputs: The input.
        by: The sums it was added to, or the basis it was brought to.
        result: What was made.
    """

    inputs: Tensor
    by: Tensor
    result: Tensor


class Common:
    """Products of inputs, made once for those layers of a batch that multiply the very same one.

    Every block keeps sums of its own; what is shared is the work. From the second batch on, a layer whose input no
    other one had adds to its sums directly, without a matrix in between.
    """

    def __init__(self) -> None:
        self._grams: deque[_Made] = deque(maxlen=REMEMBERED)
        self._rotated: deque[_Made] = deque(maxlen=REMEMBERED)
        self._bases: deque[tuple[Tensor, float, Tensor, Tensor]] = deque(maxlen=REMEMBERED)
        self._seen: set[int] = set()  # sums that have been added to before
        self._lenders: set[int] = set()  # sums whose input others have too

    def next_batch(self) -> None:
        """Forget the inputs of the last batch."""
        self._grams.clear()
        self._rotated.clear()

    def add_input_gram(self, total: Tensor, inputs: Tensor, mask: Tensor | None) -> None:
        """Add ``sum_t a_t a_t^T`` of inputs [n, t, i] to the upper triangle of a block's sums."""
        made = next((made for made in self._grams if made.inputs is inputs), None)
        if made is not None:
            self._lenders.add(id(made.by))
            total.add_(made.result)
            return
        rows = inputs.reshape(-1, inputs.shape[-1]) if mask is None else inputs[mask]
        if id(total) in self._seen and id(total) not in self._lenders:
            add_gram(total, rows)
            return
        self._seen.add(id(total))
        gram = torch.zeros_like(total)
        add_gram(gram, rows)
        total.add_(gram)
        self._grams.append(_Made(inputs, total, gram))

    def rotated(self, inputs: Tensor, basis: Tensor) -> Tensor:
        """Inputs [n, t, i] in a basis [i, i]."""
        made = next((made for made in self._rotated if made.inputs is inputs and made.by is basis), None)
        if made is None:
            made = _Made(inputs, basis, inputs @ basis)
            self._rotated.append(made)
        return made.result

    def eigenvectors(self, covariance: Tensor, count: float) -> tuple[Tensor, Tensor]:
        """Eigenvalues (float64) and vectors of ``covariance / count``; equal ones, one soon after another, once."""
        for known, number, spectrum, basis in self._bases:
            if number == count and known.shape == covariance.shape and torch.equal(known, covariance):
                return spectrum, basis
        spectrum, vectors = torch.linalg.eigh(symmetric(mirrored(covariance)) / count)
        basis = vectors.to(covariance.dtype).contiguous()
        self._bases.append((covariance, count, spectrum, basis))
        return spectrum, basis


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` to the upper triangle, tile by tile: about half the multiplications of the whole."""
    d = rows.shape[1]
    width = SPLIT if d >= 2 * SPLIT else d
    for k in range(0, d, width):
        total[k : k + width, k:].addmm_(rows[:, k : k + width].mT, rows[:, k:])


def mirrored(total: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle `add_gram` summed up."""
    return total.triu() + total.triu(1).mT
