"""The Fisher information of projected gradients, layer by layer (LoGra; Choe et al. 2024, [IA] App. D.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_influence.capture import Component, LayerRecord
from lightning_influence.capture.contexts import full_precision
from lightning_influence.capture.record import DenseRecord, FactoredRecord
from lightning_influence.curvature.base import Fisher
from lightning_influence.curvature.blocks import Block, DenseBlock, KroneckerBlock
from lightning_influence.curvature.blockwise import BlockwiseCurvature
from lightning_influence.projections.base import matrix_shape
from lightning_influence.projections.logra import LoGra

Initialisation: TypeAlias = Literal["random", "pca"]
SIDES = ("outputs", "inputs")
BASES = ("gradient_basis.0", "input_basis.0")


class ProjectedGram(BlockwiseCurvature):
    """``solve(V) = P^T (F + damping I)^{-1} P V`` with ``P V = P_out V P_in^T`` and F = E[(P g)(P g)^T] of a component.

    So that ``<g', solve(g)>`` is the influence between projected gradients; what P maps to 0 stays out of it. Only F,
    k_out k_in square, is kept and inverted (its eigendecomposition in float64): a random P is drawn from its seed.
    A component that is no larger than the projection has its exact Fisher block.

    Args:
        dimensions: What `LoGra` takes: a pair (k_out, k_in) for every component, or a number for all together. F has
            (k_out k_in)^2 entries for each component.
        damping: Absolute damping; None takes a share of the mean eigenvalue of each component's F.
        damping_share: That share.
        fisher: ``"sampled"`` labels from the model, or ``"empirical"``.
        seed: Of the sampled labels.
        projection_seed: Of the projection.
        initialisation: ``"random"`` matrices, or ``"pca"``: the leading eigenvectors of the second moments A and S of a
            layer's inputs and output gradients, by one more pass, which are kept. Components without such factors
            (embeddings, normalisation, grouped convolutions) have random matrices all the same.

    Raises:
        ValueError: If an argument is out of range.
    """

    num_passes = 1

    def __init__(
        self,
        dimensions: int | float | Sequence[int] = (32, 32),
        damping: float | None = None,
        damping_share: float = 0.1,
        fisher: Fisher = "sampled",
        seed: int = 0,
        projection_seed: int = 0,
        initialisation: Initialisation = "random",
    ) -> None:
        super().__init__(damping, damping_share, fisher, seed)
        if initialisation not in get_args(Initialisation):
            raise ValueError(f"`ProjectedGram(initialisation={initialisation!r})`: expected 'random' or 'pca'.")
        self.initialisation, self.num_passes = initialisation, 2 if initialisation == "pca" else 1
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
        if self._pass + 1 == self.num_passes:
            super().update(component, DenseRecord(record.ids, self.projection.project(component, record)))
        elif isinstance(record, FactoredRecord):
            super().update(component, record)
        else:
            self._seen.add(component.name)

    def finish_pass(self) -> None:
        """Take the eigenvectors for the projection from the first of two passes; decompose F after the last.

        Raises:
            ValueError: If a component was not seen in this pass, its sums are not finite, or the damping is too small
                to be told from 0 beside the eigenvalues.
        """
        super().finish_pass()
        if self.fitted:
            return
        for component in self.components:
            block = self.blocks.get(component.name)
            if block is None:
                continue
            for side, basis, k in zip(SIDES, BASES, self.projection.sides[component.name], strict=True):
                vectors = block.fitted[basis]  # by rising eigenvalue
                if k < len(vectors):
                    self.projection.give(component, side, vectors[:, -k:].flip(1).mT.contiguous())
        self.blocks = {}

    def block(self, component: Component, record: LayerRecord) -> Block:
        """F of projected gradients, or the moments of a layer that its projection is made of."""
        return KroneckerBlock() if isinstance(record, FactoredRecord) else DenseBlock()

    @full_precision()
    def solve(self, component: Component, gradients: Tensor) -> Tensor:
        """``P^T (F + damping I)^{-1} P V``: [q, *shape] -> [q, *shape]."""
        self._check_fitted()
        solved = self.solve_projected(component, self.projected(component, gradients))
        return self.expanded(component, solved).to(gradients.dtype).reshape(gradients.shape)

    @full_precision()
    def multiply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``P^T F P V`` of every component."""
        self._check_fitted()
        found = {}
        for component in self.components:
            given = gradients[component.name]
            rows = self.blocks[component.name].multiply(self.projected(component, given))
            found[component.name] = self.expanded(component, rows).to(given.dtype).reshape(given.shape)
        return found

    def projected(self, component: Component, gradients: Tensor) -> Tensor:
        """``P V``: [q, *shape] -> [q, k_out k_in]."""
        return self.projection.project(component, DenseRecord(torch.arange(len(gradients)), gradients))

    def solve_projected(self, component: Component, vectors: Tensor) -> Tensor:
        """``(F + damping I)^{-1}`` of projected gradients, [q, k_out k_in] -> [q, k_out k_in]."""
        return super().solve(component, vectors)

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
        return {
            "dimensions": listed,
            **super().settings(),
            "projection_seed": self.projection.seed,
            "initialisation": self.initialisation,
        }

    def state(self) -> dict[str, Tensor]:
        """F of every component, and the matrices of the projection that are not random."""
        given = {f"{name}/pca.{side}": matrix for (name, side), matrix in self.projection.given.items()}
        return {**super().state(), **given}

    def load_state(self, components: Sequence[Component], state: Mapping[str, Tensor]) -> None:
        """Restore F and the projection.

        Raises:
            StoreError: If the state is not that of these components.
        """
        given = {key: value for key, value in state.items() if key.rsplit("/", 1)[1].startswith("pca.")}
        super().load_state(components, {key: value for key, value in state.items() if key not in given})
        self.projection.start(components)
        known = {c.name: c for c in components}
        for key, matrix in given.items():
            name, side = key.rsplit("/pca.", 1)
            self.projection.give(known[name], side, matrix.clone())

    @full_precision()
    def expanded(self, component: Component, vectors: Tensor) -> Tensor:
        """``P^T``: [q, k_out k_in] -> [q, o, i]; a side that is kept whole needs no product."""
        sizes = self.projection.sides[component.name]
        found = vectors.reshape(len(vectors), *sizes)
        (k_out, k_in), (o, i) = sizes, matrix_shape(component)
        if k_in < i:
            found = found @ self.projection.matrix(component, "inputs").to(found)
        if k_out < o:
            found = self.projection.matrix(component, "outputs").to(found).mT @ found
        return found
