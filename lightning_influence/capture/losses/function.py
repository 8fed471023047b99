"""A loss given as a plain function."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lightning_influence.capture.losses.base import Batch, ExampleLoss
from lightning_influence.capture.sampling import Uniforms


class FunctionLoss(ExampleLoss):
    """A plain function ``(model, batch) -> [n]``, for the empirical Fisher and all first-order estimators."""

    reduction = "defined by a function"

    def __init__(self, function: Callable[[nn.Module, Batch], Tensor]) -> None:
        self.function = function

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[n]."""
        return self.function(model, batch)

    def sampled_losses(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Tensor:
        """Always refused.

        Raises:
            ValueError: A function says nothing about the model's output distribution.
        """
        name = getattr(self.function, "__name__", "function")
        raise ValueError(
            f"loss={name}: a function of (model, batch) cannot sample labels. Ask for fisher='empirical', or pass "
            "an ExampleLoss that defines sampled_losses."
        )
