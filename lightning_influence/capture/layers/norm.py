"""Elementwise scale and shift after a normalisation: LayerNorm and RMSNorm."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_influence.capture.layers.base import LayerCall, LayerRule, is_plain, per_example, widened
from lightning_influence.capture.record import DenseRecord


class NormRule(LayerRule):
    """``y_t = w * x̂_t + b``: the gradients are the sums over t of s_t * x̂_t and of s_t, one row each.

    Covers torch's classes and the many RMSNorm classes of transformers, known by their name and by what they
    take: one hidden state, and one weight vector.
    """

    module_types = (nn.LayerNorm, nn.RMSNorm)
    kind = "norm"

    def handles(self, module: nn.Module) -> bool:
        """torch's classes, or a class of transformers named ...RMSNorm that scales one tensor by one vector."""
        return is_plain(module, self.module_types) or _is_rms_norm(module)

    def shape(self, module: nn.Module, parameters: Sequence[str]) -> tuple[int, ...]:
        """(number of parameters, d)."""
        return (len(parameters), module.get_parameter(parameters[0]).numel())

    def record(
        self,
        module: nn.Module,
        parameters: Sequence[str],
        call: LayerCall,
        ids: Tensor,
        mask: Tensor | None,
    ) -> DenseRecord:
        """[n, number of parameters, d]."""
        n, d = len(ids), module.get_parameter(parameters[0]).numel()
        gradients = widened(call.gradients[0]).reshape(n, -1, d)
        rows = []
        for name in parameters:
            if name == "weight":
                scaled = per_example(widened(_normalised(module, call.input)), n).reshape(gradients.shape)
                rows.append((gradients * scaled).sum(1))
            else:
                rows.append(gradients.sum(1))
        return DenseRecord(ids, torch.stack(rows, dim=1))

    def split(self, module: nn.Module, parameters: Sequence[str], gradients: Tensor) -> dict[str, Tensor]:
        """One row per parameter."""
        return {p: gradients[:, k].reshape(-1, *module.get_parameter(p).shape) for k, p in enumerate(parameters)}


def _is_rms_norm(module: nn.Module) -> bool:
    cls = type(module)
    own = [name for name, parameter in module.named_parameters() if parameter is not None]
    return (
        cls.__name__.endswith("RMSNorm")
        and cls.__module__.partition(".")[0] == "transformers"
        and "forward" not in vars(module)
        and own == ["weight"]
        and module.get_parameter("weight").dim() == 1
        and len(inspect.signature(module.forward).parameters) == 1
    )


def _normalised(module: nn.Module, hidden: Tensor) -> Tensor:
    """x̂, the derivative of the output by the weight."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(widened(hidden), module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.RMSNorm):
        # Without an eps of its own it depends on the input's dtype, differently from version to version of torch.
        hidden = hidden if module.eps is None else widened(hidden)
        return F.rms_norm(hidden, list(module.normalized_shape), None, module.eps)
    # Others scale by w or by 1 + w, in a precision of their own; either way the output is affine in w.
    weight, layer = module.get_parameter("weight").detach(), _WithoutHooks(module)
    one: Tensor = functional_call(layer, {"module.weight": torch.ones_like(weight)}, (hidden,))
    zero: Tensor = functional_call(layer, {"module.weight": torch.zeros_like(weight)}, (hidden,))
    return one - zero


class _WithoutHooks(nn.Module):
    """Calls a module as its formula is, whatever hooks others have put on it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.module.forward(hidden))
