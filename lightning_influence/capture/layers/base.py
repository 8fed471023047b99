"""The contract of a layer family: from what a module saw and received to the gradients of single examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_influence.capture.record import LayerRecord


@dataclass(frozen=True)
class LayerCall:
    """One call of a module in one forward pass, with what came back in the backward pass.

    Attributes:
        args: Positional arguments, tensors detached and (where broadcast) expanded to the batch.
        kwargs: Keyword arguments, likewise.
        gradients: Gradient of the summed example losses with respect to each tensor of the output that
            takes part in the graph; zeros where the loss does not depend on it.
        outputs: Places of those tensors among the leaves of the output.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    gradients: tuple[Tensor, ...]
    outputs: tuple[int, ...] = (0,)

    @property
    def input(self) -> Tensor:
        """The first tensor handed to the module."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                return value
        raise ValueError("the module was called without a tensor")


class LayerRule(ABC):
    """How a family of layers turns a call into a `LayerRecord`.

    A rule has no state. The sum over the examples of a record's gradients equals ``parameter.grad``, and each
    one equals what autograd gives for that example alone.
    """

    module_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    kind: ClassVar[str] = "other"

    def handles(self, module: nn.Module, parameters: Sequence[str]) -> bool:
        """Whether the rule is exact for this module: a subclass with a forward of its own may not be."""
        return isinstance(module, self.module_types) and set(parameters) <= {"weight", "bias"}

    def claims_children(self, module: nn.Module) -> bool:
        """Whether the parameters of the module's children are covered together with its own."""
        return False

    def example_dimension(self, module: nn.Module, position: int = 0) -> int:
        """Dimension that runs over the examples in the output's tensor at ``position``."""
        return 0

    @abstractmethod
    def shape(self, module: nn.Module, parameters: Sequence[str]) -> tuple[int, ...]:
        """Shape of one example's gradient of these parameters."""

    @abstractmethod
    def record(
        self,
        module: nn.Module,
        parameters: Sequence[str],
        call: LayerCall,
        ids: Tensor,
        mask: Tensor | None,
    ) -> LayerRecord:
        """The gradients of the n examples of one call, factored where that is cheaper.

        Args:
            module: The module that was called.
            parameters: Its own names of the parameters to cover.
            call: Inputs and output gradients, [n, ...].
            ids: Ids of the examples, int64 [n].
            mask: Positions that belong to an example, bool [n, t], or None for all.
        """

    @abstractmethod
    def split(self, module: nn.Module, parameters: Sequence[str], gradients: Tensor) -> dict[str, Tensor]:
        """Undo the packing: gradients [n, *shape] -> per parameter [n, *parameter.shape]."""


def widened(tensor: Tensor) -> Tensor:
    """Float64 stays, everything narrower becomes float32: gradients are multiplied and summed there."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
