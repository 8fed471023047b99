"""Leading eigenpairs from a Krylov space, and influence within their span (Schioppa et al. 2022; [MS] section 5.1)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.capture import Component
from lightning_influence.curvature.base import Fisher
from lightning_influence.curvature.iterative import IterativeCurvature
from lightning_influence.curvature.products import CurvatureProduct, ProductKind
from lightning_influence.curvature.spectrum import lanczos, random_start
from lightning_influence.errors import StoreError


class Arnoldi(IterativeCurvature):
    """``solve(V) = U^T (Λ + damping)^{-1} U V`` with the ``rank`` largest eigenvalues Λ and their vectors U [r, P].

    Influence is a dot product of r numbers; what is orthogonal to U counts for nothing (Schioppa et al. 2022 scale by
    Λ^{-1}: let damping be small against Λ for that). The iteration takes ``steps`` products, one pass over the data
    each, and memory for ``steps`` vectors when fitted; the model is not kept, and the eigenpairs can be stored.

    Args:
        damping: Absolute damping; None takes a share of the mean eigenvalue of the whole matrix.
        damping_share: That share.
        product: ``"gauss-newton"`` or ``"hessian"``; of the latter positive eigenvalues only are kept.
        rank: Eigenpairs to keep, where so many are positive.
        steps: Dimension of the Krylov space.
        tolerance: Of `residuals`; above it there is a warning.
        fisher: Labels of the pass for the mean eigenvalue.
        seed: Of those labels and of the vector that the space begins with.

    Attributes:
        eigenvalues: Float64 [r], descending.
        vectors: [r, P], the components' gradients one after another.
        residuals: ``|G u - Λ u| / (Λ + damping)`` of each pair, float64 [r], measured by one more product.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        damping: float | None = None,
        damping_share: float = 0.1,
        product: ProductKind = "gauss-newton",
        rank: int = 32,
        steps: int = 100,
        tolerance: float = 1e-2,
        fisher: Fisher = "sampled",
        seed: int = 0,
    ) -> None:
        super().__init__(damping, damping_share, product, fisher, seed)
        if type(rank) is not int or rank < 1:
            raise ValueError(f"`Arnoldi(rank={rank!r})`: expected an int >= 1.")
        if type(steps) is not int or steps < rank:
            raise ValueError(f"`Arnoldi(steps={steps!r})`: expected an int of at least rank={rank}; 3 times that, say.")
        if not 0 < tolerance < 1:
            raise ValueError(f"`Arnoldi(tolerance={tolerance!r})`: expected a number in (0, 1).")
        self.rank, self.steps, self.tolerance = rank, steps, tolerance
        self.eigenvalues = self.vectors = self.residuals = torch.empty(0)

    def settings(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {**super().settings(), "rank": self.rank, "steps": self.steps, "tolerance": self.tolerance}

    def multiply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``U^T Λ U V`` of the whole gradient, components together."""
        self._check_fitted()
        flat = self._flat(gradients)
        columns = self.vectors.to(flat.device)
        coordinates = flat.to(columns) @ columns.mT * self.eigenvalues.to(columns)
        return self._by_component(coordinates @ columns, gradients)

    def state(self) -> dict[str, Tensor]:
        """Eigenpairs, and the damping that goes with them."""
        self._check_fitted()
        mean = torch.tensor(self._mean_eigenvalue, dtype=torch.float64)
        names = ("eigenvalues", "vectors", "residuals")
        return {**{name: getattr(self, name) for name in names}, "mean_eigenvalue": mean}

    def load_state(self, components: Sequence[Component], state: Mapping[str, Tensor]) -> None:
        """Restore them.

        Raises:
            StoreError: If the vectors have another length than the components together.
        """
        size = sum(c.numel for c in components)
        if state["vectors"].shape[1] != size:
            raise StoreError(f"Arnoldi.load_state: vectors of {state['vectors'].shape[1]} for {size} parameters.")
        # Copies lie where torch puts tensors: with another alignment, as in a file, products round differently.
        self.eigenvalues, self.vectors = state["eigenvalues"].clone(), state["vectors"].clone()
        self.residuals = state["residuals"].clone()
        self._mean_eigenvalue = float(state["mean_eigenvalue"])
        self.components, self.fitted = tuple(components), True

    def _take(self, product: CurvatureProduct, progress: bool) -> None:
        start = random_start(product.size, self.seed, product.like)
        values, vectors = lanczos(product, start, min(self.steps, product.size), self.rank)
        kept = values > 100 * torch.finfo(vectors.dtype).eps * values[0].abs()
        if not bool(kept.any()):
            raise ValueError(f"`{self!r}`: found no positive eigenvalue; expected a matrix other than 0.")
        count = int(kept.sum())
        self.eigenvalues, self.vectors = values[:count].clone(), vectors[:count].contiguous()
        image = product(self.vectors)
        rest = image - self.eigenvalues.to(image).unsqueeze(1) * self.vectors
        lengths = torch.linalg.vector_norm(rest, dim=1, dtype=torch.float64).cpu()
        self.residuals = lengths / (self.eigenvalues + self._damping)
        self._tell()

    def _tell(self) -> None:
        """Say so when the space was too small."""
        far = int((self.residuals > self.tolerance).sum())
        if far:
            warnings.warn(
                f"{self!r}: {far} of {len(self.residuals)} eigenpairs have not converged, largest residual "
                f"{float(self.residuals.max()):.2g}. Raise steps, or lower rank.",
                stacklevel=5,
            )

    def _apply(self, components: Sequence[Component], vectors: Tensor) -> Tensor:
        columns, values = self._basis(components)
        columns = columns.to(vectors.device)
        weights = 1 / (values + self._damping)
        coordinates = vectors.to(columns) @ columns.mT * weights.to(columns)
        return (coordinates @ columns).to(vectors.dtype)

    def _basis(self, components: Sequence[Component]) -> tuple[Tensor, Tensor]:
        """Eigenvectors [r, P_c] and eigenvalues of the block of some components of ``U^T Λ U``."""
        if len(components) == len(self.components):
            return self.vectors, self.eigenvalues
        parts = torch.split(self.vectors, [c.numel for c in self.components], dim=1)
        names = [c.name for c in self.components]
        rows = torch.cat([parts[names.index(c.name)] for c in components], dim=1).double()
        root = rows * self.eigenvalues.to(rows).sqrt().unsqueeze(1)
        values, inner = torch.linalg.eigh(root @ root.mT)
        kept = values > 1e-10 * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
        values, inner = values[kept], inner[:, kept]
        block = inner.mT @ root / values.sqrt().unsqueeze(1)
        return block.to(self.vectors.dtype), values
