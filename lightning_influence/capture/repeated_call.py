"""A call of a module repeated on single examples, to differentiate it by some parameters example by example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class RepeatedCall:
    """``sum_k <output_k, cotangent_k>`` of one example, and its gradient by the parameters.

    Everything runs in float32 at least, whatever precision the batch ran in, and leaves the module as it was.

    Attributes:
        module: The module.
        parameters: The parameters to differentiate by, detached, under names of the caller's choice.
        slots: Those names by the names that the module knows, several for a parameter under several names.
        arguments: Arguments ``(args, kwargs)`` of the batch.
        dimensions: For each leaf of the arguments the dimension that runs over the examples, or None for what
            they share. It may hold several rows for each example, one example's after the other's.
        cotangents: Gradients by the outputs of the batch.
        places: For each cotangent the place of the output among the leaves of what the module returns, and
            the dimension that runs over the examples.
    """

    module: nn.Module
    parameters: Mapping[str, Tensor]
    slots: Mapping[str, str]
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]]
    dimensions: Sequence[int | None]
    cotangents: Sequence[Tensor]
    places: Sequence[tuple[int, int]]

    def gradients(self) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients [n, *parameter.shape] by name, and `fingerprint` of the outputs [n, outputs, 2].

        In one vmap where all operations can be batched, else in a loop.
        """
        parameters = {name: _wide(tensor) for name, tensor in self.parameters.items()}
        others = {name: _wide(tensor) for name, tensor in _others(self.module) if name not in self.slots}
        n = self.cotangents[0].shape[self.places[0][1]]
        leaves, spec = pytree.tree_flatten((self.arguments[0], dict(self.arguments[1])))
        leaves = [
            _wide(x) if d is None else _wide(x).unflatten(d, (n, -1))
            for x, d in zip(leaves, self.dimensions, strict=True)
        ]
        cotangents = [_wide(s).unflatten(d, (n, 1)) for s, (_, d) in zip(self.cotangents, self.places, strict=True)]

        def contracted(
            parameters: dict[str, Tensor], leaves: list[Any], cotangents: list[Tensor]
        ) -> tuple[Tensor, Tensor]:
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            given = {**others, **{slot: parameters[name] for slot, name in self.slots.items()}}
            returned = pytree.tree_leaves(functional_call(self.module, given, args, kwargs, tie_weights=False))
            outputs = [_wide(returned[place]) for place, _ in self.places]
            total = torch.stack([(y * s).sum() for y, s in zip(outputs, cotangents, strict=True)]).sum()
            return total, torch.stack([fingerprint(y, d)[0] for y, (_, d) in zip(outputs, self.places, strict=True)])

        with _attributes_kept(self.module), torch.enable_grad():
            dimensions = (None, list(self.dimensions), [d for _, d in self.places])
            try:
                mapped = vmap(grad(contracted, has_aux=True), in_dims=dimensions)
                gradients, fingerprints = mapped(parameters, leaves, cotangents)
                return gradients, fingerprints
            except Exception:  # no batching rule, control flow that depends on data: whatever it is, the loop decides
                return _looped(contracted, parameters, leaves, cotangents, dimensions, n)


def fingerprint(tensor: Tensor, dim: int) -> Tensor:
    """Mean and mean square of each example's part, [n, 2]: enough to recognise it later, without keeping it."""
    rows = _wide(tensor.detach()).movedim(dim, 0).flatten(1)
    return torch.stack([rows.mean(1), rows.square().mean(1)], dim=1)


def same(before: Tensor, after: Tensor, precision: float) -> bool:
    """Whether two fingerprints [n, 2] are of the same tensor, computed twice with this relative precision."""
    squares = before[:, 1][before[:, 1].isfinite()]
    scale = float(squares.amax()) if len(squares) else 0.0
    means = torch.isclose(before[:, 0], after[:, 0], rtol=precision, atol=precision * scale**0.5, equal_nan=True)
    rest = torch.isclose(before[:, 1], after[:, 1], rtol=precision, atol=precision * scale, equal_nan=True)
    return bool((means & rest).all())


def _looped(
    function: Any,
    parameters: dict[str, Tensor],
    leaves: list[Any],
    cotangents: list[Tensor],
    dimensions: tuple[None, list[int | None], list[int]],
    n: int,
) -> tuple[dict[str, Tensor], Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    seen = []
    for k in range(n):
        alone = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
        arguments = [x if d is None else x.select(d, k) for x, d in zip(leaves, dimensions[1], strict=True)]
        received = [s.select(d, k) for s, d in zip(cotangents, dimensions[2], strict=True)]
        total, prints = function(alone, arguments, received)
        gradients = torch.autograd.grad(total, list(alone.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(alone, gradients, strict=True):
            found[name].append(gradient)
        seen.append(prints)
    return {name: torch.stack(parts) for name, parts in found.items()}, torch.stack(seen)


def parameter_slots(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every place that holds a parameter, once: a tied parameter has several, a module used twice has not."""
    for prefix, child in module.named_modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{name}".lstrip("."), parameter


def _others(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers detached, a buffer copied since the module may write to it."""
    for slot, parameter in parameter_slots(module):
        yield slot, parameter.detach()
    for slot, buffer in module.named_buffers():
        yield slot, buffer.detach().clone()


def _wide(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.float() if narrow else value


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Plain attributes that the modules set while they run, such as the weight of weight_norm, are set back."""
    before = [(child, dict(vars(child))) for child in module.modules()]
    try:
        yield
    finally:
        for child, attributes in before:
            vars(child).clear()
            vars(child).update(attributes)
