"""What the modules of a model see and return in one forward pass, and what comes back to them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from lightning_influence.capture.layers import LayerCall, LayerRule
from lightning_influence.capture.layers.base import first_tensor
from lightning_influence.capture.repeated_call import fingerprint


@dataclass(frozen=True)
class Output:
    """One tensor that a module returned.

    Attributes:
        place: Where it is among the leaves of what was returned.
        dim: Which of its dimensions should run over the examples.
        edge: Its place in the graph, which stays valid whatever happens to the tensor in place afterwards.
        shape: Its shape.
        dtype: Its dtype.
        device: Its device.
        fingerprint: Of its values, for rules that call the module again.
    """

    place: int
    dim: int
    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    fingerprint: Tensor | None

    def keeps_examples(self, n: int) -> bool:
        """Whether it has one row per example where it should."""
        return self.shape[self.dim : self.dim + 1] == (n,)


@dataclass
class Call:
    """One call of one module.

    Attributes:
        module: Qualified name of the module.
        args: Positional arguments, tensors detached.
        kwargs: Keyword arguments, likewise.
        precision: Relative precision with which the module computed.
        outputs: Floating-point tensors that it returned.
        gradients: Their gradients, after the backward pass; None where the loss does not depend on one.
    """

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    precision: float = 0.0
    outputs: list[Output] = field(default_factory=list)
    gradients: Sequence[Tensor | None] = ()

    def __post_init__(self) -> None:
        tensors = pytree.tree_map_only(Tensor, torch.Tensor.detach, (self.args, self.kwargs))
        self.args, self.kwargs = tensors
        self._versions = self._current_versions()

    @property
    def inputs(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def problem(self, n: int) -> str | None:
        """Why the gradients of n examples cannot be told from this call, or None."""
        if not self.outputs:
            return "it returned no floating-point tensor that could carry a gradient"
        if self.reaches_loss and self._current_versions() != self._versions:
            return "its input was modified in place after the layer ran; replace the in-place operation"
        for output, gradient in zip(self.outputs, self.gradients, strict=True):
            if gradient is not None and not output.keeps_examples(n):
                return (
                    f"an output has shape {tuple(output.shape)}; expected the {n} examples of the batch in dimension "
                    f"{output.dim} (no flattened or time-first layout)"
                )
        return None

    @property
    def reaches_loss(self) -> bool:
        """Whether the loss depends on anything that was returned."""
        return any(gradient is not None for gradient in self.gradients)

    def layer_call(self, n: int, memo: dict[Hashable, Tensor]) -> LayerCall:
        """The call as the rules take it; they share the memo."""
        kept = [(o, g) for o, g in zip(self.outputs, self.gradients, strict=True) if o.keeps_examples(n)]
        return LayerCall(
            args=self.args,
            kwargs=self.kwargs,
            gradients=tuple(torch.zeros(o.shape, dtype=o.dtype, device=o.device) if g is None else g for o, g in kept),
            outputs=tuple(o.place for o, _ in kept),
            fingerprints=tuple(o.fingerprint for o, _ in kept if o.fingerprint is not None),
            precision=self.precision,
            memo=memo,
        )

    def _current_versions(self) -> tuple[int, ...]:
        return tuple(tensor._version for tensor in self.inputs)


class CallLog:
    """Notes the calls of one forward pass, from hooks, and gives every example its own row where they share one.

    Args:
        n: Number of examples.
        shared: Names of modules that were seen to serve all examples at once, without a dimension for them (position
            embeddings of indices [t]); the log adds to it.

    Attributes:
        calls: The calls in the order in which they ended.
        spread: Names of modules whose output was shared by the examples, and is one row for each of them now.
        memo: What rules made of inputs that several layers have.
    """

    def __init__(self, n: int, shared: set[str]) -> None:
        self.n = n
        self.shared = shared
        self.calls: list[Call] = []
        self.spread: set[str] = set()
        self.memo: dict[Hashable, Tensor] = {}
        self._entered: dict[str, list[Call]] = {}

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    def of(self, module: str) -> list[Call]:
        """The calls of a module on which the loss depends; if there are none, one whose gradient is zero."""
        calls = [call for call in self.calls if call.module == module]
        idle = [call for call in calls if any(output.keeps_examples(self.n) for output in call.outputs)]
        return [call for call in calls if call.reaches_loss] or idle[:1]

    @property
    def edges(self) -> list[GradientEdge]:
        """Where gradients are wanted, call by call."""
        return [output.edge for call in self.calls for output in call.outputs]

    def receive(self, gradients: Sequence[Tensor | None]) -> None:
        """Hand the gradients at the `edges` to their calls."""
        rest = list(gradients)
        for call in self.calls:
            call.gradients, rest = rest[: len(call.outputs)], rest[len(call.outputs) :]

    def enter(self, name: str, args: Any, kwargs: Any) -> None:
        """Note the arguments of a call before other hooks get them."""
        self._entered.setdefault(name, []).append(Call(name, args, kwargs))

    def leave(self, name: str, module: nn.Module, rule: LayerRule, args: Any, kwargs: Any, output: Any) -> Any:
        """Note a call with what it returned; the model goes on with what this returns instead."""
        call = self._entered[name].pop() if rule.repeats_call else Call(name, args, kwargs)
        if not torch.is_grad_enabled():
            return output
        leaves, spec = pytree.tree_flatten(output)
        floating = {
            k: value for k, value in enumerate(leaves) if isinstance(value, Tensor) and value.is_floating_point()
        }
        replaced: dict[int, Tensor] = {}
        for place, value in floating.items():
            if id(value) not in replaced:  # returned twice, everything flows through its first place
                replaced[id(value)] = self._noted(call, module, rule, place, value, alone=len(floating) == 1)
            leaves[place] = replaced[id(value)]
        if rule.repeats_call:
            call.precision = rounding([*call.inputs, *module.parameters(), *floating.values()])
        if torch._C._current_graph_task_id() == -1:  # else an activation checkpoint recomputes what was noted before
            self.calls.append(call)
        return pytree.tree_unflatten(leaves, spec)

    def _noted(self, call: Call, module: nn.Module, rule: LayerRule, place: int, value: Tensor, alone: bool) -> Tensor:
        dim = rule.example_dimension(module, place)
        if call.module in self.shared or (call.inputs and rule.is_shared(first_tensor(call.args, call.kwargs), self.n)):
            self.shared.add(call.module)
            value = value.unsqueeze(0)
        if not value.requires_grad:  # everything below is frozen: the graph starts here
            value = value.detach().requires_grad_().clone()
        elif not alone:  # one output may depend on another (LSTM): keep what flows from outside apart
            value = value.clone()
        if value.dim() > dim and value.shape[dim] == 1 and self.n > 1:
            self.spread.add(call.module)
            value = value.expand(*value.shape[:dim], self.n, *value.shape[dim + 1 :]).contiguous()
        seen = fingerprint(value, dim) if rule.repeats_call and value.dim() > dim else None
        edge = get_gradient_edge(value)
        call.outputs.append(Output(place, dim, edge, value.shape, value.dtype, value.device, seen))
        return value


def rounding(tensors: Iterable[Tensor]) -> float:
    """Square root of the spacing of the coarsest number format that takes part: room for rounding, for little else."""
    tensors = list(tensors)
    formats = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    devices = {tensor.device.type for tensor in tensors}
    formats |= {torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    return float(max((torch.finfo(kind).eps for kind in formats), default=0.0) ** 0.5)
