"""No curvature: the identity, for which influence is the gradient dot product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_influence.capture import Component, LayerRecord
from lightning_influence.curvature.base import Curvature


class Identity(Curvature):
    """``solve`` returns its argument; nothing is fitted and nothing is stored."""

    num_passes = 0

    def __init__(self) -> None:
        self.fitted = True

    def update(self, component: Component, record: LayerRecord) -> None:
        """Nothing to learn."""

    def finish_pass(self) -> None:
        """Nothing to finish."""

    def solve(self, component: Component, gradients: Tensor) -> Tensor:
        """The gradients themselves."""
        return gradients

    def whitened_size(self, component: Component) -> int:
        """As many as the component has parameters."""
        return component.numel

    def whiten(self, component: Component, record: LayerRecord) -> Tensor:
        """The gradients themselves, [n, P]."""
        return record.example_gradients().flatten(1)

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same, for the components of whatever model."""
        return dict(gradients)

    def multiply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients themselves."""
        return dict(gradients)

    def settings(self) -> dict[str, Any]:
        """No arguments."""
        return {}
