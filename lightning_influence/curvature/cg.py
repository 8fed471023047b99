"""Conjugate gradients on curvature products ([MS] section 5.1; Hestenes and Stiefel 1952, Martens 2010)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.capture import Component
from lightning_influence.curvature.base import Curvature, Fisher
from lightning_influence.curvature.iterative import Convergence, IterativeCurvature
from lightning_influence.curvature.products import CurvatureProduct, ProductKind


class CG(IterativeCurvature):
    """``(G + damping I) x = v`` solved for all queries at once, each by its own conjugate gradients from x = 0.

    A step costs one pass over the data, for the queries that have not converged yet; one more pass at the end measures
    the residual that is reported. With a preconditioner the
    residuals are compared in the metric of its inverse, so that directions of large curvature, which it knows, are
    not what costs steps; the solution is the same. Scalars are summed in float64, vectors are in the gradients' dtype.

    Args:
        damping: Absolute damping; None takes a share of the mean eigenvalue of the whole matrix.
        damping_share: That share.
        product: ``"gauss-newton"`` or ``"hessian"``.
        preconditioner: Such as ``EKFAC()``. Fitted on the same data unless it is fitted already, and best damped by
            about the same number.
        tolerance: Of ``|v - (G + damping I) x| / |v|``.
        max_steps: After which a query that has not converged is left as it is, with a warning.
        fisher: Labels of the pass for the mean eigenvalue.
        seed: Of those labels.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        damping: float | None = None,
        damping_share: float = 0.1,
        product: ProductKind = "gauss-newton",
        preconditioner: Curvature | None = None,
        tolerance: float = 1e-4,
        max_steps: int = 200,
        fisher: Fisher = "sampled",
        seed: int = 0,
    ) -> None:
        super().__init__(damping, damping_share, product, fisher, seed)
        if not (isinstance(preconditioner, Curvature) or preconditioner is None):
            raise ValueError(f"`CG(preconditioner={preconditioner!r})`: expected a Curvature, such as EKFAC().")
        if isinstance(preconditioner, IterativeCurvature):
            raise ValueError(
                f"`CG(preconditioner={preconditioner!r})`: a solver that stops at a tolerance is not the same matrix "
                "in every step. Expected a curvature in closed form, such as EKFAC()."
            )
        if not 0 < tolerance < 1:
            raise ValueError(f"`CG(tolerance={tolerance!r})`: expected a number in (0, 1).")
        if type(max_steps) is not int or max_steps < 1:
            raise ValueError(f"`CG(max_steps={max_steps!r})`: expected an int >= 1.")
        self.preconditioner, self.tolerance, self.max_steps = preconditioner, tolerance, max_steps
        self._fits_preconditioner = preconditioner is not None and not preconditioner.fitted

    def start(self, components: Sequence[Component]) -> None:
        """Begin the pass.

        Raises:
            ValueError: If the preconditioner was fitted on other components.
        """
        known = self.preconditioner.components if self.preconditioner is not None else ()
        if known and not self._fits_preconditioner and set(known) != set(components):
            odd = sorted({c.name for c in set(known) ^ set(components)})
            raise ValueError(
                f"`CG(preconditioner=...)`: {type(self.preconditioner).__name__} was fitted on other components; only "
                f"one of the two has {odd[:8]}. Expected the same components, or an unfitted preconditioner."
            )
        super().start(components)

    def settings(self) -> dict[str, Any]:
        """Constructor arguments; the preconditioner as an unfitted twin, unless it came fitted."""
        inner = self.preconditioner
        if inner is not None and self._fits_preconditioner:
            inner = type(inner)(**inner.settings())
        own = {"preconditioner": inner, "tolerance": self.tolerance, "max_steps": self.max_steps}
        return {**super().settings(), **own}

    def _take(self, product: CurvatureProduct, progress: bool) -> None:
        super()._take(product, progress)
        if self.preconditioner is None:
            return
        if self._fits_preconditioner:
            components = list(self.components)
            self.preconditioner.fit(product.model, product.loader, product.loss, components, progress=progress)
        self.preconditioner.to(next(product.model.parameters()).device)

    def _apply(self, components: Sequence[Component], vectors: Tensor) -> Tensor:
        product, damping = self._block(components), self._damping
        lengths = _dots(vectors, vectors).sqrt()
        lengths = torch.where(lengths > 0, lengths, 1.0)
        solution, residual = torch.zeros_like(vectors), vectors.clone()
        direction = self._preconditioned(components, residual)
        rho = _dots(residual, direction)
        steps = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
        trail = [_dots(residual, residual).sqrt() / lengths]
        bar = tqdm(range(self.max_steps), desc="CG", delay=3, leave=False, disable=not self._progress)
        for _ in bar:
            rows = (trail[-1] > self.tolerance).nonzero().flatten()
            if not len(rows):
                break
            ahead = direction[rows]
            image = product(ahead).add_(ahead, alpha=damping)
            curvature = _dots(ahead, image)
            self._check_positive(curvature / _dots(ahead, ahead))
            rate = _column(rho[rows] / curvature, vectors)
            solution[rows] += rate * ahead
            residual[rows] -= rate * image
            turned = self._preconditioned(components, residual[rows])
            fresh = _dots(residual[rows], turned)
            direction[rows] = turned + _column(fresh / rho[rows], vectors) * ahead
            rho[rows] = fresh
            steps[rows] += 1
            trail.append(_dots(residual, residual).sqrt() / lengths)
        # Residuals from the recursion drift from the true ones by rounding, unnoticed; so the last is taken anew.
        rest = vectors - product(solution) - damping * solution
        trail[-1] = _dots(rest, rest).sqrt() / lengths
        found = Convergence(torch.stack(trail).cpu(), steps.cpu(), self.tolerance)
        more = ", or pass preconditioner=EKFAC()" if self.preconditioner is None else ""
        self._report(found, f"Raise max_steps, tolerance or damping{more}.")
        return solution

    def _preconditioned(self, components: Sequence[Component], vectors: Tensor) -> Tensor:
        if self.preconditioner is None:
            return vectors.clone()
        parts = torch.split(vectors, [c.numel for c in components], dim=1)
        blocks = {c.name: part.reshape(-1, *c.shape) for c, part in zip(components, parts, strict=True)}
        if len(components) == len(self.components):
            solved = self.preconditioner.precondition(blocks)
        else:
            solved = {c.name: self.preconditioner.solve(c, blocks[c.name]) for c in components}
        return torch.cat([solved[c.name].flatten(1) for c in components], dim=1)

    def _check_positive(self, quotients: Tensor) -> None:
        lowest = float(quotients.min())
        if not lowest > 0:
            raise ValueError(
                f"`{self!r}`: a direction of curvature {lowest:.3g} was met, damping of {self._damping:.3g} included; "
                "conjugate gradients need a positive matrix. Raise damping above the difference, or take "
                "product='gauss-newton'."
            )


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Inner products row by row, float64 [q]."""
    return (left * right).sum(1, dtype=torch.float64)


def _column(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.to(like.dtype).unsqueeze(1)
