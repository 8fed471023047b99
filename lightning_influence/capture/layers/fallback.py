"""Any other module with parameters: its vector-Jacobian product, example by example, through torch.func."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from lightning_influence.capture.forward import runner
from lightning_influence.capture.layers.base import LayerCall, LayerRule, widened
from lightning_influence.capture.record import DenseRecord
from lightning_influence.capture.repeated_call import RepeatedCall, parameter_slots, same
from lightning_influence.errors import UnsupportedLayerError


class FallbackRule(LayerRule):
    """Exact for every module that treats the examples of a batch separately in evaluation mode.

    The module is called again on each example (batched by vmap where its operations allow it), and its output
    is contracted with the gradient that came back. That the outputs are the same again is checked, so a module
    that mixes examples, draws random numbers or keeps a state is refused. The gradient of all covered
    parameters is one flat vector.
    """

    repeats_call = True

    def handles(self, module: nn.Module) -> bool:
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
        """[n, P].

        Raises:
            UnsupportedLayerError: If single examples do not give the outputs that the batch gave.
        """
        n = len(ids)
        args, kwargs = _named_arguments(module, call)
        repeated = RepeatedCall(
            module=module,
            parameters={p: module.get_parameter(p).detach() for p in parameters},
            slots=_slots(self, module, parameters),
            arguments=(args, kwargs),
            dimensions=list(self._input_dimensions(module, args, kwargs, n)),
            cotangents=call.gradients,
            places=[(k, self.example_dimension(module, k)) for k in call.outputs],
        )
        gradients, after = repeated.gradients()
        if not all(same(before, after[:, k], call.precision) for k, before in enumerate(call.fingerprints)):
            raise UnsupportedLayerError(
                "called again on single examples it returned something else than for the batch: it mixes examples "
                "(batch statistics), shares an argument between them, draws random numbers or keeps a state"
            )
        rows = [widened(gradients[p]).reshape(n, -1) for p in parameters]
        return DenseRecord(ids, torch.cat(rows, dim=1).detach())

    def split(self, module: nn.Module, parameters: Sequence[str], gradients: Tensor) -> dict[str, Tensor]:
        """Consecutive slices of the flat vector."""
        sizes = [module.get_parameter(p).numel() for p in parameters]
        slices = zip(parameters, torch.split(gradients, sizes, dim=1), strict=True)
        return {p: part.reshape(-1, *module.get_parameter(p).shape) for p, part in slices}

    def _input_dimensions(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], n: int
    ) -> Iterator[int | None]:
        """Where the examples run in each leaf of the arguments; None when all share it."""
        for leaf in pytree.tree_leaves(tuple(args)):
            yield _dimension(leaf, 0, n)
        for name, value in kwargs.items():
            for leaf in pytree.tree_leaves(value):
                if name in ("query", "key", "value", "input"):
                    yield _dimension(leaf, self.example_dimension(module), n)
                elif isinstance(module, nn.RNNBase):
                    yield _dimension(leaf, 1, n)
                elif isinstance(module, nn.MultiheadAttention) and name == "attn_mask":  # [t, s] or [n * heads, t, s]
                    yield 0 if isinstance(leaf, Tensor) and leaf.dim() == 3 else None
                else:
                    yield _dimension(leaf, 0, n)


def _named_arguments(module: nn.Module, call: LayerCall) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """By name for torch's sequence layers, whose arguments have their examples in different dimensions."""
    if not isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return call.args, call.kwargs
    return (), inspect.signature(module.forward).bind(*call.args, **call.kwargs).arguments


def _dimension(leaf: Any, d: int, n: int) -> int | None:
    return d if isinstance(leaf, Tensor) and leaf.dim() > d and leaf.shape[d] == n else None


def _slots(rule: FallbackRule, module: nn.Module, parameters: Sequence[str]) -> dict[str, str]:
    """Every name under which the module itself uses one of the parameters: that name -> the parameter.

    A child that is called and uses it too (tied) is another use, with calls of its own.
    """
    names = {id(module.get_parameter(p)): p for p in parameters}
    claims = rule.claims_children(module)
    return {
        slot: names[id(parameter)]
        for slot, parameter in parameter_slots(module)
        if id(parameter) in names and (claims or not runner(module, slot.rpartition(".")[0]))
    }
