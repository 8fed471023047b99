"""What Kronecker-factored blocks have in common: queries, keys and values multiply the same input."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.capture.layers.base import REMEMBERED
from lightning_influence.curvature.base import symmetric

Basis: TypeAlias = tuple[Tensor, ...]  # orthonormal columns of each diagonal block [d, d], in their order

LANES = 16  # a product with a number of columns that is no multiple takes up to half as long again, or twice
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
    result: tuple[Tensor, ...]


class Common:
    """Products of inputs, made once for those layers of a batch that multiply the very same one.

    Every block keeps sums of its own; what is shared is the work. From the second batch on, a layer whose input no
    other one had adds to its sums directly, without a matrix in between.
    """

    def __init__(self) -> None:
        self._grams: deque[_Made] = deque(maxlen=REMEMBERED)
        self._rotated: deque[_Made] = deque(maxlen=REMEMBERED)
        self._bases: deque[tuple[Tensor, float, Tensor, Tensor]] = deque(maxlen=REMEMBERED)
        self._decomposed: dict[int, tuple[Tensor, Tensor]] = {}
        self._padded: dict[tuple[int, ...], Basis] = {}
        self._seen: set[int] = set()  # sums that have been added to before
        self._lenders: set[int] = set()  # sums whose input others have too

    def next_batch(self) -> None:
        """Forget the inputs of the last batch."""
        self._grams.clear()
        self._rotated.clear()

    def add_input_grams(self, totals: Sequence[Tensor], inputs: Tensor, mask: Tensor | None) -> None:
        """Add ``sum_t a_t a_t^T`` of inputs [n, t, i] to a block's sums, see `add_grams`."""
        first = totals[0]
        made = next((made for made in self._grams if made.inputs is inputs), None)
        if made is not None:
            self._lenders.add(id(made.by))
            for total, gram in zip(totals, made.result, strict=True):
                total.add_(gram)
            return
        rows = inputs.reshape(-1, inputs.shape[-1]) if mask is None else inputs[mask]
        if id(first) in self._seen and id(first) not in self._lenders:
            add_grams(totals, rows)
            return
        self._seen.add(id(first))
        grams = tuple(torch.zeros_like(total) for total in totals)
        add_grams(grams, rows)
        for total, gram in zip(totals, grams, strict=True):
            total.add_(gram)
        self._grams.append(_Made(inputs, first, grams))

    def rotated(self, inputs: Tensor, basis: Basis) -> Tensor:
        """Inputs [n, t, i] in a basis."""
        made = next((made for made in self._rotated if made.inputs is inputs and made.by is basis[0]), None)
        if made is None:
            made = _Made(inputs, basis[0], (self.rotate(inputs, basis),))
            self._rotated.append(made)
        return made.result[0]

    def rotate(self, rows: Tensor, basis: Basis) -> Tensor:
        """`rotate` for many batches: columns of zeros are added to the basis once, so that products run faster."""
        key = tuple(id(piece) for piece in basis)
        if key not in self._padded:
            pads = (-piece.shape[1] % LANES for piece in basis)
            self._padded[key] = tuple(F.pad(p, (0, pad)) if pad else p for p, pad in zip(basis, pads, strict=True))
        return rotate(rows, self._padded[key])

    def eigenvectors(self, covariance: Tensor, count: float) -> tuple[Tensor, Tensor]:
        """Eigenvalues (float64) and vectors of ``covariance / count``; equal ones, one soon after another, once."""
        if id(covariance) in self._decomposed:
            return self._decomposed[id(covariance)]
        for known, number, spectrum, basis in self._bases:
            if number == count and known.shape == covariance.shape and torch.equal(known, covariance):
                return spectrum, basis
        spectrum, vectors = torch.linalg.eigh(symmetric(mirrored(covariance)) / count)
        basis = vectors.to(covariance.dtype).contiguous()
        self._bases.append((covariance, count, spectrum, basis))
        return spectrum, basis

    def decompose(self, factors: Mapping[str, tuple[Tensor, float]], rank: int, ranks: int) -> dict[str, Tensor]:
        """Do this rank's share of what `eigenvectors` will be asked for, by its cost, the cube of the width.

        Args:
            factors: Sums, the same on all ranks, and what they are divided by.
            rank: Of this process.
            ranks: How many there are.

        Returns:
            Eigenvalues and vectors by name, 0 where another rank does the work: to be added up over ranks in place,
            before `eigenvectors` is called.
        """
        first = _first_equal(factors)
        owners = shared_out({key: len(factors[key][0]) ** 3 for key in factors if first[key] == key}, ranks)
        found: dict[str, Tensor] = {}
        for key, owner in owners.items():
            total, count = factors[key]
            if owner == rank:
                values, vectors = self.eigenvectors(total, count)
            else:
                values, vectors = total.new_zeros(len(total), dtype=torch.float64), torch.zeros_like(total)
            found |= {f"{key}/values": values, f"{key}/vectors": vectors}
        for key, (total, _) in factors.items():
            self._decomposed[id(total)] = (found[f"{first[key]}/values"], found[f"{first[key]}/vectors"])
        return found


def _first_equal(factors: Mapping[str, tuple[Tensor, float]]) -> dict[str, str]:
    """For each factor the first with the same numbers: queries, keys and values have one covariance of inputs."""
    alike: dict[tuple[int, float, float], list[str]] = {}
    first: dict[str, str] = {}
    for key, (total, count) in factors.items():
        known = alike.setdefault((len(total), count, float(total.diagonal().sum())), [])
        first[key] = next((k for k in known if torch.equal(factors[k][0], total)), key)
        if first[key] == key:
            known.append(key)
    return first


def shared_out(costs: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Who does what: the dearest first, each to the rank with the least to do so far.

    >>> shared_out({"a": 1, "b": 8, "c": 6}, 2)
    {'a': 1, 'b': 0, 'c': 1}
    """
    load, owners = [0] * ranks, dict.fromkeys(costs, 0)
    for key in sorted(costs, key=lambda key: -costs[key]):
        owners[key] = load.index(min(load))
        load[owners[key]] += costs[key]
    return owners


def add_grams(totals: Sequence[Tensor], rows: Tensor) -> None:
    """`add_gram` for each diagonal block, with its own columns of the rows."""
    start = 0
    for total in totals:
        add_gram(total, rows[:, start : start + len(total)])
        start += len(total)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` to the upper triangle, tile by tile: about half the multiplications of the whole."""
    d = rows.shape[1]
    width = SPLIT if d >= 2 * SPLIT else d
    for k in range(0, d, width):
        total[k : k + width, k:].addmm_(rows[:, k : k + width].mT, rows[:, k:])


def rotate(rows: Tensor, basis: Basis) -> Tensor:
    """``rows Q``: [..., d] -> [..., d]; columns beyond the rows of a piece are zeros and left out of the result."""
    parts = torch.split(rows, [len(piece) for piece in basis], dim=-1)
    found = [(part @ piece)[..., : len(piece)] for part, piece in zip(parts, basis, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def back(rows: Tensor, basis: Basis) -> Tensor:
    """``rows Q^T``: [..., d] -> [..., d]."""
    return rotate(rows, tuple(piece.mT for piece in basis))


def mirrored(total: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle `add_gram` summed up."""
    return total.triu() + total.triu(1).mT
