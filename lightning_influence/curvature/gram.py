"""The Fisher information of projected gradients, layer by layer (LoGra; Choe et al. 2024, [IA] App. D.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_influence.capture import Component, LayerRecord
from lightning_influence.capture.contexts import full_precision
from lightning_influence.capture.record import DenseRecord
from lightning_influence.curvature.base import Fisher
from lightning_influence.curvature.blocks import DenseBlock
from lightning_influence.curvature.blockwise import BlockwiseCurvature
from lightning_influence.projections.base import matrix_shape
from lightning_influence.projections.logra import LoGra


class ProjectedGram(BlockwiseCurvature):
    """``solve(V) = P^T (F + damping I)^{-1} P V`` with ``P V = P_out V P_in^T`` and F = E[(P g)(P g)^T] of a component.

    So that ``<g', solve(g)>`` is the influence between projected gradients; what P maps to 0 stays out of it. Only F,
    k_out k_in square, is kept and inverted (its eigendecomposition in float64): P is drawn from its seed again. A
    component that is no larger than the projection has its exact Fisher block.

    Args:
        dimensions: What `LoGra` takes: a pair (k_out, k_in) for every component, or a number for all together. F has
            (k_out k_in)^2 entries for each component.
        damping: Absolute damping; None takes a share of the mean eigenvalue of each component's F.
        damping_share: That share.
        fisher: ``"sampled"`` labels from the model, or ``"empirical"``.
        seed: Of the sampled labels.
        projection_seed: Of the projection.

    Raises:
        ValueError: If an argument is out of range.
    """

    num_passes: ClassVar[int] = 1

    def __init__(
        self,
        dimensions: int | float | Sequence[int] = (32, 32),
        damping: float | None = None,
        damping_share: float = 0.1,
        fisher: Fisher = "sampled",
        seed: int = 0,
        projection_seed: int = 0,
    ) -> None:
        super().__init__(damping, damping_share, fisher, seed)
        self.projection = LoGra(dimensions, seed=projection_seed)

    def start(self, components: Sequence[Component]) -> None:
        """Begin the pass.

        Raises:
            ValueError: If the dimensions do not suit the components.
        """
        self.projection.start(components)
        super().start(components)

    def update(self, component: Component, record: LayerRecord) -> None:
        """Project the example gradients from their factors and add up their outer products."""
        super().update(component, DenseRecord(record.ids, self.projection.project(component, record)))

    def block(self, component: Component, record: LayerRecord) -> DenseBlock:
        """F of the projected gradients."""
        return DenseBlock()

    @full_precision()
    def solve(self, component: Component, gradients: Tensor) -> Tensor:
        """``P^T (F + damping I)^{-1} P V``: [q, *shape] -> [q, *shape]."""
        self._check_fitted()
        rows = DenseRecord(torch.arange(len(gradients)), gradients)
        solved = super().solve(component, self.projection.project(component, rows))
        return self._expanded(component, solved).to(gradients.dtype).reshape(gradients.shape)

    def whitened_size(self, component: Component) -> int:
        """k_out k_in."""
        return self.projection.size_of(component)

    def whiten(self, component: Component, record: LayerRecord) -> Tensor:
        """``(F + damping I)^{-1/2} P g``, [n, k_out k_in]; the gradient itself is not formed."""
        self._check_fitted()
        return super().whiten(component, DenseRecord(record.ids, self.projection.project(component, record)))

    def settings(self) -> dict[str, Any]:
        """Constructor arguments."""
        dimensions = self.projection.dimensions
        listed = list(dimensions) if isinstance(dimensions, tuple) else dimensions
        return {"dimensions": listed, **super().settings(), "projection_seed": self.projection.seed}

    def load_state(self, components: Sequence[Component], state: Mapping[str, Tensor]) -> None:
        """Restore F, and draw the projection again.

        Raises:
            StoreError: If the state is not that of these components.
        """
        super().load_state(components, state)
        self.projection.start(components)

    def _expanded(self, component: Component, vectors: Tensor) -> Tensor:
        """``P^T``: [q, k_out k_in] -> [q, o, i]; a side that is kept whole needs no product."""
        sizes = self.projection.sides[component.name]
        found = vectors.reshape(len(vectors), *sizes)
        (k_out, k_in), (o, i) = sizes, matrix_shape(component)
        if k_in < i:
            found = found @ self.projection.matrix(component, "inputs").to(found)
        if k_out < o:
            found = self.projection.matrix(component, "outputs").to(found).mT @ found
        return found
