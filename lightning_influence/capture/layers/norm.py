"""Elementwise scale and shift after a normalisation: LayerNorm and RMSNorm."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.capture.layers.base import LayerCall, LayerRule, widened
from lightning_influence.capture.record import DenseRecord


class NormRule(LayerRule):
    """``y_t = w * x̂_t + b``: the gradients are the sums over t of s_t * x̂_t and of s_t, one row each.

    Covers torch's classes and the RMSNorm classes of transformers, whose only argument is the hidden state;
    whether they scale by w or by 1 + w makes no difference to the gradient.
    """

    module_types = (nn.LayerNorm, nn.RMSNorm)
    kind = "norm"

    def handles(self, module: nn.Module, parameters: Sequence[str]) -> bool:
        """torch's own forward, or a class named ...RMSNorm that takes one tensor."""
        if isinstance(module, self.module_types):
            own = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
            return own and super().handles(module, parameters)
        if not type(module).__name__.endswith("RMSNorm") or tuple(parameters) != ("weight",):
            return False
        plain = len(inspect.signature(module.forward).parameters) == 1
        return plain and module.get_parameter("weight").dim() == 1 and _epsilon(module) is not None

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
        d = module.get_parameter(parameters[0]).numel()
        gradients = widened(call.gradients[0]).reshape(len(ids), -1, d)
        rows = []
        for name in parameters:
            if name == "weight":
                hidden = widened(call.input)
                rows.append((gradients * _normalised(module, hidden).reshape(gradients.shape)).sum(1))
            else:
                rows.append(gradients.sum(1))
        return DenseRecord(ids, torch.stack(rows, dim=1))

    def split(self, module: nn.Module, parameters: Sequence[str], gradients: Tensor) -> dict[str, Tensor]:
        """One row per parameter."""
        return {p: gradients[:, k].reshape(-1, *module.get_parameter(p).shape) for k, p in enumerate(parameters)}


def _normalised(module: nn.Module, hidden: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(hidden, module.normalized_shape, None, None, module.eps)
    shape = module.normalized_shape if isinstance(module, nn.RMSNorm) else hidden.shape[-1:]
    return F.rms_norm(hidden, list(shape), None, _epsilon(module))


def _epsilon(module: nn.Module) -> float | None:
    """torch's RMSNorm leaves eps at None for the machine epsilon of the input, which F.rms_norm also does."""
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(found) if found is not None else None
