"""What a pool's interactions look like from afar: between its classes, and along their leading directions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.curvature.base import symmetric
from lightning_influence.estimators.factors import Factors, Id, check_labels

_ROUNDING = 1e-12  # of the largest eigenvalue: below it there is nothing but rounding


@dataclass(frozen=True, eq=False)
class ClassInteractions:
    """Mean pairwise interaction K_ij between the examples of two classes, an example with itself left out.

    K_ij > 0: added together, i and j lower the target by less than their sum; removed together they raise it by more
    ([IA] section 3.1). Alike examples of one class have K > 0, those of different classes mostly K < 0.

    Attributes:
        labels: Names of the c classes, sorted.
        values: Mean over pairs, float64 [c, c], symmetric; NaN for a class of one example with itself.
        counts: Examples of each class, int64 [c].
    """

    labels: tuple[Id, ...]
    values: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of the interactions K [n, n] of a pool.

    Attributes:
        eigenvalues: Those that are not 0, largest in size first, float64; negative ones only if H_f has such.
        num_examples: n.
    """

    eigenvalues: Tensor
    num_examples: int

    def shares(self) -> Tensor:
        """Part of ``Σ |λ|`` that the first 1, 2, ... directions have together, float64, ascending to 1.

        >>> Spectrum(torch.tensor([3.0, -1.0]).double(), 5).shares()
        tensor([0.7500, 1.0000], dtype=torch.float64)
        """
        sizes = self.eigenvalues.abs()
        return sizes.cumsum(0) / sizes.sum()

    def rank(self, share: float) -> int:
        """How many leading directions have this share together.

        Raises:
            ValueError: If the share is not in (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(f"`Spectrum.rank(share={share!r})`: expected a share in (0, 1], such as 0.9.")
        return min(len(self.eigenvalues), 1 + int((self.shares() < share - _ROUNDING).sum()))


def class_interactions(pool: Factors, labels: Iterable[Id]) -> ClassInteractions:
    """Means over pairs of K = F M F^T from one sum of features for each class; K is not formed."""
    names = check_labels("mean_interactions", "labels", labels, len(pool))
    classes = sorted(set(names))
    members = [[row for row, name in enumerate(names) if name == label] for label in classes]
    sums = torch.stack([pool.shift(rows) for rows in members])
    counts = torch.tensor([len(rows) for rows in members], device=sums.device)
    own = pool.self_interactions()
    totals = sums @ pool.lift(sums).mT
    totals.diagonal().sub_(torch.stack([own[rows].sum() for rows in members]))
    pairs = torch.outer(counts, counts) - torch.diag(counts)
    means = torch.where(pairs > 0, totals / pairs, torch.nan)
    return ClassInteractions(tuple(classes), means, counts)


def spectrum_of(pool: Factors) -> Spectrum:
    """From the smaller of K itself and its r x r form R M R^T, where F = Q R."""
    features = pool.shift([]).new_empty(0) if pool.features is None else pool.features.double()
    n, r = features.shape
    root = features if n <= r else torch.linalg.qr(features, mode="r").R
    values = torch.linalg.eigvalsh(symmetric(pool.lift(root) @ root.mT))
    values = values[values.abs().argsort(descending=True)]
    kept = values.abs() > _ROUNDING * values[:1].abs()
    return Spectrum(values[kept], n)
