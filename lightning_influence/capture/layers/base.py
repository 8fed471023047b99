"""The contract of a layer family: from what a module saw and received to the gradients of single examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_influence.capture.record import LayerRecord

REMEMBERED = 4  # inputs of which something is kept: low-rank adapters put theirs between those of queries and keys


@dataclass(frozen=True)
class LayerCall:
    """One call of a module in one forward pass, with what came back in the backward pass.

    Attributes:
        args: Positional arguments, tensors detached.
        kwargs: Keyword arguments, likewise.
        gradients: Gradient of the summed example losses with respect to each tensor of the output that
            takes part in the graph; zeros where the loss does not depend on it.
        outputs: Places of those tensors among the leaves of the output.
        fingerprints: Of each of those tensors, for rules that call the module again.
        precision: Relative precision with which the module computed.
        memo: What was last made of inputs of the same forward pass, see `once`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    gradients: tuple[Tensor, ...]
    outputs: tuple[int, ...] = (0,)
    fingerprints: tuple[Tensor, ...] = ()
    precision: float = 1e-3
    memo: dict[Hashable, Tensor] = field(default_factory=dict)

    @property
    def input(self) -> Tensor:
        """The first tensor handed to the module; its first dimension may be 1, shared by all examples."""
        return first_tensor(self.args, self.kwargs)

    def once(self, what: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Something made of the input: the same tensor for layers that were handed the same input in short order.

        Queries, keys and values multiply one hidden state; who compares many examples needs its products once.

        Args:
            what: Name of what is made.
            make: Makes it.
        """
        x = self.input
        key = (what, x.data_ptr(), x.dtype, x.device, tuple(x.shape), tuple(x.stride()))
        found = self.memo.pop(key, None)
        self.memo[key] = make() if found is None else found
        if len(self.memo) > REMEMBERED:
            del self.memo[next(iter(self.memo))]
        return self.memo[key]


class LayerRule(ABC):
    """How a family of layers turns a call into a `LayerRecord`.

    A rule has no state. The sum over the examples of a record's gradients equals ``parameter.grad``, and each
    one equals what autograd gives for that example alone.

    Attributes:
        module_types: The torch classes it covers.
        kind: Family name that its components carry.
        repeats_call: Whether it calls the module again. Then a call is noted from the outside, before and after
            other hooks of the module; otherwise from the inside, where the layer's own formula holds.
    """

    module_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    kind: ClassVar[str] = "other"
    repeats_call: ClassVar[bool] = False

    def handles(self, module: nn.Module) -> bool:
        """Whether the rule is exact for this module: one of the types, computing what that type computes."""
        return is_plain(module, self.module_types)

    def claims_children(self, module: nn.Module) -> bool:
        """Whether the parameters of the module's children are covered together with its own."""
        return False

    def example_dimension(self, module: nn.Module, position: int = 0) -> int:
        """Dimension that runs over the examples in the output's tensor at ``position``."""
        return 0

    def is_shared(self, inputs: Tensor, n: int) -> bool:
        """Whether this input, and then the output, has no dimension for the examples but serves all of them."""
        return False

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


def is_plain(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module computes what one of these classes does, from a weight and a bias that are parameters.

    Not so for a subclass or an instance with another forward, and for a weight that is computed from something
    else first (parametrisations, weight_norm, pruning).
    """
    if not isinstance(module, types) or "forward" in vars(module) or is_parametrized(module):
        return False
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    return own <= {"weight", "bias"} and any(type(module).forward is t.forward for t in types)


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor among the arguments of a call."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def per_example(tensor: Tensor, n: int) -> Tensor:
    """[1, ...] or [n, ...] -> [n, ...], without a copy."""
    return tensor.expand(n, *tensor.shape[1:])


def widened(tensor: Tensor) -> Tensor:
    """Float64 stays, everything narrower becomes float32: gradients are multiplied and summed there."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
