"""What K-FAC and EK-FAC share: factors of inputs and gradients, from all of the data or a part, whole or in pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_influence.capture import Component, LayerRecord
from lightning_influence.capture.contexts import full_precision
from lightning_influence.curvature.base import Fisher
from lightning_influence.curvature.blocks import Block, block_for
from lightning_influence.curvature.blockwise import BlockwiseCurvature
from lightning_influence.curvature.damping import damping_of
from lightning_influence.curvature.subsample import Subsample, Unit, check_subsample


class KroneckerCurvature(BlockwiseCurvature):
    """Blocks with Kronecker factors A of a layer's inputs and S of the gradients at its outputs.

    Members differ in the number of passes; their arguments, and how a component is covered, are told at `EKFAC`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        damping: float | None = None,
        damping_share: float = 0.1,
        fisher: Fisher = "sampled",
        seed: int = 0,
        *,
        covariance_share: float = 1.0,
        covariance_of: Unit = "examples",
        max_width: int | None = None,
    ) -> None:
        super().__init__(damping, damping_share, fisher, seed)
        owner = type(self).__name__
        check_subsample(owner, covariance_share, covariance_of)
        if max_width is not None and (type(max_width) is not int or max_width < 1):
            raise ValueError(f"`{owner}(max_width={max_width!r})`: expected an int >= 1, or None for whole factors.")
        self.covariance_share, self.covariance_of = covariance_share, covariance_of
        self.max_width = max_width

    def block(self, component: Component, record: LayerRecord) -> Block:
        """The most exact that the structure of a component allows."""
        return block_for(record, self.max_width, self._subsample())

    def needed(self, ids: Sequence[int]) -> list[int]:
        """In a pass that is only for the basis, the examples that were drawn."""
        subsample = self._subsample()
        last = self._pass + 1 >= self.num_passes
        return list(ids) if subsample is None or last else subsample.examples(ids)

    @full_precision()
    def rotated(self, component: Component, record: LayerRecord) -> Tensor:
        """In the eigenbasis of the block, [n, *shape]."""
        self._check_fitted()
        return self.blocks[component.name].rotated(record)

    @full_precision()
    def precondition_rotated(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In the coordinates of the parameters."""
        self._check_fitted()
        solved = {}
        for c in self.components:
            block = self.blocks[c.name]
            damping = damping_of(block.eigenvalues(), self.damping, self.damping_share)
            solved[c.name] = block.solve_rotated(gradients[c.name], damping).to(gradients[c.name].dtype)
        return solved

    def settings(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            **super().settings(),
            "covariance_share": self.covariance_share,
            "covariance_of": self.covariance_of,
            "max_width": self.max_width,
        }

    def _subsample(self) -> Subsample | None:
        if self.covariance_share == 1:
            return None
        return Subsample(self.covariance_share, self.covariance_of, self.seed)
