"""A loss that is known for whole batches only."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Literal

from torch import Tensor, nn
from typing_extensions import Self

from lightning_influence.capture.losses.base import Batch, ExampleLoss, at_least_float
from lightning_influence.capture.sampling import Uniforms

BatchReduction = Literal["mean", "sum"]


class BatchLoss(ExampleLoss):
    """One number for a whole batch, the mean or the sum of what its examples lose.

    The gradient of an example is then what flows back through its own rows of the activations, and one pass gives
    those of all examples. Terms of the parameters alone (weight decay) are not seen, as they belong to no example.
    Whether the number really is such a mean or sum, only a comparison with single examples can tell: `probe_loss`.

    Args:
        batch_reduction: What the number is.
    """

    name: str = "batch loss"

    def __init__(self, batch_reduction: BatchReduction = "mean") -> None:
        if batch_reduction not in ("mean", "sum"):
            raise ValueError(f"`{type(self).__name__}(batch_reduction={batch_reduction!r})`: expected 'mean' or 'sum'.")
        self.batch_reduction = batch_reduction
        self.reduction = f"defined by {self.name}, a {batch_reduction} over examples"

    def summed(self) -> Self:
        """The same loss, taken as a sum."""
        twin = copy.copy(self)
        BatchLoss.__init__(twin, "sum")
        return twin

    @abstractmethod
    def batch_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of the batch, [], attached to the graph."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[n]: for every example the same number, whose sum is that over the examples; see `is_shared`."""
        n = self.batch_size(batch)
        value = at_least_float(self.batch_loss(model, batch))
        return (value if self.batch_reduction == "mean" else value / n).expand(n)

    def sampled_losses(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Tensor:
        """Always refused.

        Raises:
            ValueError: The loss of a batch says nothing about the model's output distribution.
        """
        raise ValueError(
            f"loss={self.name}: the loss of a batch cannot sample labels. Ask for fisher='empirical', or pass an "
            "ExampleLoss that defines sampled_losses."
        )


def is_shared(losses: Tensor) -> bool:
    """Whether losses [n] are one number of the whole batch, in one place of memory, and not one of each example."""
    return len(losses) > 1 and losses.stride(0) == 0
