"""Any other module with parameters: its vector-Jacobian product, example by example, through torch.func."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from lightning_influence.capture.layers.base import LayerCall, LayerRule, widened
from lightning_influence.capture.record import DenseRecord


class FallbackRule(LayerRule):
    """Exact for every module that treats the examples of a batch separately in evaluation mode.

    The module is called again on each example (batched by vmap where its operations allow it), and its output
    is contracted with the gradient that came back. The gradient of all covered parameters is one flat vector.
    """

    def handles(self, module: nn.Module, parameters: Sequence[str]) -> bool:
        """Everything."""
        return True

    def claims_children(self, module: nn.Module) -> bool:
        """Modules that use their children's parameters without calling the children."""
        return isinstance(module, nn.MultiheadAttention) or is_parametrized(module)

    def example_dimension(self, module: nn.Module, position: int = 0) -> int:
        """0, but for torch's sequence layers, which may put time first and always put layers first in states."""
        if isinstance(module, nn.MultiheadAttention):
            return 0 if module.batch_first or position else 1
        if isinstance(module, nn.RNNBase):
            return 0 if module.batch_first and not position else 1
        return 0

    def shape(self, module: nn.Module, parameters: Sequence[str]) -> tuple[int, ...]:
        """(P,)."""
        return (sum(module.get_parameter(p).numel() for p in parameters),)

    def record(
        self,
        module: nn.Module,
        parameters: Sequence[str],
        call: LayerCall,
        ids: Tensor,
        mask: Tensor | None,
    ) -> DenseRecord:
        """[n, P]."""
        n = len(ids)
        leaves, spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
        dims = [_input_dimension(self, module, leaf, k, n) for k, leaf in enumerate(leaves)]
        values = {p: module.get_parameter(p).detach() for p in parameters}
        cotangents = list(call.gradients)
        places = [self.example_dimension(module, k) for k in call.outputs]

        def inner(values: dict[str, Tensor], leaves: list[Any], cotangents: list[Tensor]) -> Tensor:
            alone = [x if d is None else x.unsqueeze(d) for x, d in zip(leaves, dims, strict=True)]
            args, kwargs = pytree.tree_unflatten(alone, spec)
            output = pytree.tree_leaves(functional_call(module, values, args, kwargs))
            pairs = zip(call.outputs, cotangents, places, strict=True)
            return torch.stack([(output[k] * s.unsqueeze(d)).sum() for k, s, d in pairs]).sum()

        with torch.enable_grad():
            gradients = _each(grad(inner), values, leaves, cotangents, (dims, places), n)
        return DenseRecord(ids, torch.cat([widened(gradients[p]).reshape(n, -1) for p in parameters], dim=1).detach())

    def split(self, module: nn.Module, parameters: Sequence[str], gradients: Tensor) -> dict[str, Tensor]:
        """Consecutive slices of the flat vector."""
        sizes = [module.get_parameter(p).numel() for p in parameters]
        slices = zip(parameters, torch.split(gradients, sizes, dim=1), strict=True)
        return {p: part.reshape(-1, *module.get_parameter(p).shape) for p, part in slices}


def _each(
    function: Any,
    values: dict[str, Tensor],
    leaves: list[Any],
    cotangents: list[Tensor],
    dims: tuple[list[int | None], list[int]],
    n: int,
) -> dict[str, Tensor]:
    """The function on every example: in one vmap, or one by one where an operation cannot be batched."""
    if all(isinstance(leaf, Tensor) for leaf in leaves) and any(d is not None for d in dims[0]):
        try:
            mapped = vmap(function, in_dims=(None, dims[0], dims[1]))
            return dict(mapped(values, leaves, cotangents))
        except (RuntimeError, ValueError):  # no batching rule, or control flow that depends on the data
            pass
    alone = []
    for k in range(n):
        one = [leaf if d is None else leaf.select(d, k) for leaf, d in zip(leaves, dims[0], strict=True)]
        seen = [s.select(d, k) for s, d in zip(cotangents, dims[1], strict=True)]
        alone.append(function(values, one, seen))
    return {p: torch.stack([g[p] for g in alone]) for p in values}


def _input_dimension(rule: FallbackRule, module: nn.Module, leaf: Any, position: int, n: int) -> int | None:
    """Where the examples run in an argument; None when it is shared by all of them."""
    if not isinstance(leaf, Tensor):
        return None
    # Query, key and value come first in attention, the masks that follow have examples first.
    first = position < 3 if isinstance(module, nn.MultiheadAttention) else position == 0
    d = rule.example_dimension(module, 0 if first else 1)
    return d if leaf.dim() > d and leaf.shape[d] == n else None
