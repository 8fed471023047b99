"""Coordinates in which gradients of single examples are kept as rows: all parameters, or LoGra's projected space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.capture import Component, LayerRecord
from lightning_influence.curvature import Curvature, ProjectedGram
from lightning_influence.curvature.products import CurvatureProduct


class Coordinates(ABC):
    """Rows [q, r] that stand for parameter vectors of all components.

    Args:
        components: In the order of the coordinates.
        curvature: H, fitted on them.

    Attributes:
        sizes: Coordinates of each component.
    """

    sizes: list[int]

    def __init__(self, components: Sequence[Component], curvature: Curvature) -> None:
        self.components, self.curvature = list(components), curvature

    @property
    def size(self) -> int:
        """r."""
        return sum(self.sizes)

    @abstractmethod
    def of(self, component: Component, record: LayerRecord) -> Tensor:
        """Gradients of one component, [n, its size]."""

    @abstractmethod
    def solve(self, rows: Tensor) -> Tensor:
        """``H⁻¹``, [q, r] -> [q, r]."""

    @abstractmethod
    def vectors(self, rows: Tensor) -> dict[str, Tensor]:
        """The parameter vectors that rows [q, r] stand for, by component: each [q, *shape]."""

    @abstractmethod
    def rows(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """The adjoint of `vectors`: [q, r]."""

    def multiply(self, curvature: Curvature, rows: Tensor) -> Tensor:
        """Another curvature, without damping, [q, r] -> [q, r]."""
        return self.rows(curvature.multiply(self.vectors(rows)))

    def product(self, product: CurvatureProduct, rows: Tensor) -> Tensor:
        """Exact products, [q, r] -> [q, r]."""
        vectors = self.vectors(rows)
        flat = torch.cat([vectors[c.name].flatten(1) for c in self.components], dim=1)
        parts = torch.split(product(flat), [c.numel for c in self.components], dim=1)
        pairs = zip(self.components, parts, strict=True)
        return self.rows({c.name: part.reshape(-1, *c.shape) for c, part in pairs})

    def _split(self, rows: Tensor) -> list[Tensor]:
        return list(torch.split(rows, self.sizes, dim=1))


class WholeGradients(Coordinates):
    """All parameters: r is their number."""

    def __init__(self, components: Sequence[Component], curvature: Curvature) -> None:
        super().__init__(components, curvature)
        self.sizes = [c.numel for c in components]

    def of(self, component: Component, record: LayerRecord) -> Tensor:
        """[n, P_c]."""
        return record.example_gradients().flatten(1)

    def solve(self, rows: Tensor) -> Tensor:
        """[q, P] -> [q, P]."""
        return self.rows(self.curvature.precondition(self.vectors(rows)))

    def vectors(self, rows: Tensor) -> dict[str, Tensor]:
        """[q, P] in the shapes of the components."""
        pairs = zip(self.components, self._split(rows), strict=True)
        return {c.name: part.reshape(-1, *c.shape) for c, part in pairs}

    def rows(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """[q, P]: one component after another."""
        return torch.cat([vectors[c.name].flatten(1) for c in self.components], dim=1)


class ProjectedGradients(Coordinates):
    """The space of a `ProjectedGram`, ``P g`` of k_out k_in numbers for a component; no whole gradient is formed."""

    curvature: ProjectedGram

    def __init__(self, components: Sequence[Component], curvature: ProjectedGram) -> None:
        super().__init__(components, curvature)
        self.sizes = [curvature.projection.size_of(c) for c in components]

    def of(self, component: Component, record: LayerRecord) -> Tensor:
        """[n, k_out k_in], from the factors of the gradients."""
        return self.curvature.projection.project(component, record)

    def solve(self, rows: Tensor) -> Tensor:
        """``(F + damping I)⁻¹`` of every component."""
        pairs = zip(self.components, self._split(rows), strict=True)
        return torch.cat([self.curvature.solve_projected(c, part).to(rows.dtype) for c, part in pairs], dim=1)

    def vectors(self, rows: Tensor) -> dict[str, Tensor]:
        """``P^T``."""
        pairs = zip(self.components, self._split(rows), strict=True)
        return {c.name: self.curvature.expanded(c, part).reshape(-1, *c.shape) for c, part in pairs}

    def rows(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """``P``."""
        return torch.cat([self.curvature.projected(c, vectors[c.name]) for c in self.components], dim=1)


def coordinates_of(components: Sequence[Component], curvature: Curvature) -> Coordinates:
    """Those that suit a fitted curvature."""
    if isinstance(curvature, ProjectedGram):
        return ProjectedGradients(components, curvature)
    return WholeGradients(components, curvature)
