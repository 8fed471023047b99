"""Curvature of groups as EK-FAC itself has it: a diagonal in the eigenbasis of H."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_influence.capture import Component, LayerRecord
from lightning_influence.curvature.damping import damping_of
from lightning_influence.curvature.kronecker import KroneckerCurvature
from lightning_influence.estimators.gradient_coordinates import WholeGradients
from lightning_influence.estimators.newton_step import IndefiniteError


class EigenCurvature:
    """H_S of groups, of which only the diagonal in the eigenbasis Q of H = Q diag(h) Q^T is taken.

    EK-FAC's eigenvalues are means over the training examples of ``(Q^T ĝ_i)²``. Left with the examples that are not in
    S they are the curvature that EK-FAC, with the same basis, has without S: for groups of the training data and under
    the very labels of the fit, ``h - w Σ_S (Q^T ĝ_i)²`` is never below the damping, and the Newton step always defined.
    What alike members share off the diagonal is left out, as in H itself: the step is shorter than that of exact
    matrices, and no surer than F+I where groups are large.

    Args:
        shares: ``(Q^T ĝ_i)² / h`` [n, r]; any float dtype.
        eigenvalues: h [r], damping included.
        scaled: ``Q diag(factors) Q^T v`` of a vector v in the coordinates of the group, for factors [r].
    """

    def __init__(self, shares: Tensor, eigenvalues: Tensor, scaled: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.shares, self.eigenvalues, self.scaled = shares, eigenvalues, scaled

    def newton_shift(self, first: Tensor, rows: Sequence[int], weight: float, sign: float) -> Tensor:
        """``w (H - sign w H_S)⁻¹ Σ g`` from ``first = w H⁻¹ Σ g``; sign 1 for a removal, -1 for an addition.

        Raises:
            IndefiniteError: If ``H - w H_S`` is not positive definite.
        """
        rest = 1 - sign * self._of(rows, weight)
        if bool((rest <= 0).any()):
            raise IndefiniteError(1 - float(rest.min()), -float((rest * self.eigenvalues).min()))
        return self.scaled(first, rest.reciprocal())

    def curvature_term(self, gradient: Tensor, first: Tensor, rows: Sequence[int], weight: float) -> Tensor:
        """``w ∇f^T H⁻¹ H_S U``, in which all matrices commute."""
        return gradient @ self.scaled(first, self._of(rows, weight))

    def curvature_vectors(self, gradient: Tensor, weight: float) -> Tensor:
        """v_i [n, P] with ``Σ_{i∈S} v_i^T U`` = `curvature_term`: the matrices are symmetric."""
        return torch.stack([self.scaled(gradient, self._of([row], weight)) for row in range(len(self.shares))])

    def subset(self, rows: Sequence[int]) -> EigenCurvature:
        """Of some examples."""
        return EigenCurvature(self.shares[list(rows)], self.eigenvalues, self.scaled)

    def _of(self, rows: Sequence[int], weight: float) -> Tensor:
        """``w H_S / h`` [r], float64."""
        return weight * self.shares[list(rows)].sum(0, dtype=torch.float64)


class WhitenedGradients(WholeGradients):
    """Gradients in the eigenbasis of K-FAC or EK-FAC, divided by the roots of the damped eigenvalues.

    Args:
        components: In the order of the coordinates.
        curvature: Fitted on them.
    """

    curvature: KroneckerCurvature

    def __init__(self, components: Sequence[Component], curvature: KroneckerCurvature) -> None:
        super().__init__(components, curvature)
        self.whole = self.sizes
        self.sizes = [curvature.whitened_size(c) for c in components]

    def of(self, component: Component, record: LayerRecord) -> Tensor:
        """[n, its size]."""
        return self.curvature.whiten(component, record)

    def eigenvalues(self) -> Tensor:
        """h [r], damping included, float64."""
        found = []
        for c in self.components:
            own = self.curvature.blocks[c.name].eigenvalues()
            found.append(own.flatten() + damping_of(own, self.curvature.damping, self.curvature.damping_share))
        return torch.cat([part.double() for part in found])

    def scaled(self, vector: Tensor, factors: Tensor) -> Tensor:
        """``Q diag(factors) Q^T v``: [P] and [r] -> [P]."""
        parts = zip(self.components, torch.split(vector, self.whole), torch.split(factors, self.sizes), strict=True)
        found = []
        for c, part, own in parts:
            block = self.curvature.blocks[c.name]
            like = block.eigenvalues()
            found.append(block.scaled(part.reshape(1, *c.shape), own.reshape(like.shape).to(like.dtype)).flatten())
        return torch.cat([part.to(vector.dtype) for part in found])
