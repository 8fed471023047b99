"""What K-FAC and EK-FAC share: one block per component, each damped by its own mean eigenvalue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.capture import Component, LayerRecord
from lightning_influence.curvature.base import Curvature, Fisher, check_fisher
from lightning_influence.curvature.blocks import Block, block_for, load_block
from lightning_influence.curvature.common import Common
from lightning_influence.curvature.damping import check_damping, damping_of
from lightning_influence.errors import StoreError


class BlockwiseCurvature(Curvature):
    """A block-diagonal Fisher; members differ in the number of passes over the data.

    Args:
        damping: Absolute damping; None takes a share of each component's mean eigenvalue.
        damping_share: That share; 0.1 as in Grosse et al. 2023.
        fisher: ``"sampled"`` labels from the model, or ``"empirical"``.
        seed: Of the sampled labels.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        damping: float | None = None,
        damping_share: float = 0.1,
        fisher: Fisher = "sampled",
        seed: int = 0,
    ) -> None:
        check_damping(type(self).__name__, damping, damping_share)
        check_fisher(type(self).__name__, fisher, seed)
        self.damping, self.damping_share, self.fisher, self.seed = damping, damping_share, fisher, seed
        self.blocks: dict[str, Block] = {}
        self._pass = 0
        self._seen: set[str] = set()
        self._common, self._batch = Common(), torch.empty(0)

    def start(self, components: Sequence[Component]) -> None:
        """Begin the first pass."""
        super().start(components)
        self.blocks, self._pass, self._seen = {}, 0, set()
        self._common, self._batch = Common(), torch.empty(0)

    def update(self, component: Component, record: LayerRecord) -> None:
        """Covariances in the first pass, squares in their eigenbasis in the second."""
        if component.name not in self.blocks:
            self.blocks[component.name] = block_for(record)
        if record.ids is not self._batch:  # records of a batch come with the same ids
            self._batch = record.ids
            self._common.next_batch()
        self.blocks[component.name].update(record, self._pass == 1, self._common)
        self._seen.add(component.name)

    def finish_pass(self) -> None:
        """Eigendecompositions after the first pass, the exact Lambda after the second.

        Raises:
            ValueError: If a component was not seen in this pass, or its sums are not finite.
        """
        unseen = [c.name for c in self.components if c.name not in self._seen]
        if unseen or not self._seen:
            raise ValueError(
                f"`{type(self).__name__}.finish_pass()`: pass {self._pass + 1} saw no gradient of {unseen[:8]}; "
                "expected at least one example in every pass."
            )
        self._check_finite()
        for block in self.blocks.values():
            block.finish(self._pass == 1, self._common)
            # In memory as it will be read back from a store, so that solving rounds in the same way.
            block.fitted = {key: value.contiguous() for key, value in block.fitted.items()}
        self._pass, self._seen, self._common = self._pass + 1, set(), Common()
        self.fitted = self._pass == self.num_passes

    def _check_finite(self) -> None:
        wild = [
            name
            for name, block in self.blocks.items()
            if not all(bool(s.isfinite().all()) for s in block.sums.values())
        ]
        if wild:
            raise ValueError(
                f"`{type(self).__name__}.finish_pass()`: the sums of {wild[:8]} are not finite, though every loss was: "
                "the inputs or gradients of some example are too large to be squared. Expected examples on a common "
                "scale; look for extreme values in the data."
            )

    def solve(self, component: Component, gradients: Tensor) -> Tensor:
        """``(G_c + damping I)^{-1} V``: [q, *shape] -> [q, *shape]."""
        self._check_fitted()
        block = self.blocks[component.name]
        return block.solve(gradients, damping_of(block.eigenvalues(), self.damping, self.damping_share))

    def partial(self) -> dict[str, Tensor]:
        """Sums of the current pass, keyed ``component/sum``."""
        return {f"{name}/{key}": value for name, block in self.blocks.items() for key, value in block.sums.items()}

    def settings(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            "damping": self.damping,
            "damping_share": self.damping_share,
            "fisher": self.fisher,
            "seed": self.seed,
        }

    def state(self) -> dict[str, Tensor]:
        """Bases and eigenvalues, keyed ``component/kind.tensor``."""
        self._check_fitted()
        return {
            f"{name}/{block.kind}.{key}": value
            for name, block in self.blocks.items()
            for key, value in block.fitted.items()
        }

    def load_state(self, components: Sequence[Component], state: Mapping[str, Tensor]) -> None:
        """Restore bases and eigenvalues.

        Raises:
            StoreError: If the state is not that of these components.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, tensor = key.rsplit("/", 1)
            # A copy lies where torch puts tensors: with another alignment, as in a file, products round differently.
            parts.setdefault(name, {})[tensor] = value.clone()
        odd = sorted({c.name for c in components} ^ set(parts))
        if odd:
            raise StoreError(f"{type(self).__name__}.load_state: only one of components and factors has {odd[:8]}.")
        self.blocks = {name: load_block(tensors) for name, tensors in parts.items()}
        super().load_state(components, state)
