"""Layers that multiply by a matrix at every position: nn.Linear and the Conv1D of transformers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_influence.capture.layers.base import LayerCall, LayerRule, widened
from lightning_influence.capture.record import FactoredRecord


class LinearRule(LayerRule):
    """``y_t = W a_t + b``: the gradient of an example is the sum over t of s_t (a_t, 1)^T."""

    module_types = (nn.Linear,)
    kind = "linear"

    def handles(self, module: nn.Module, parameters: Sequence[str]) -> bool:
        """nn.Linear with its own forward, or the transposed layer of transformers' GPT-2."""
        if _is_transposed(module):
            return set(parameters) <= {"weight", "bias"}
        return super().handles(module, parameters) and type(module).forward is nn.Linear.forward

    def shape(self, module: nn.Module, parameters: Sequence[str]) -> tuple[int, ...]:
        """(o, i + bias); a bias alone is (o, 1)."""
        weight = module.get_parameter("weight")
        o, i = reversed(weight.shape) if _is_transposed(module) else weight.shape
        return (o, i * ("weight" in parameters) + ("bias" in parameters))

    def record(
        self,
        module: nn.Module,
        parameters: Sequence[str],
        call: LayerCall,
        ids: Tensor,
        mask: Tensor | None,
    ) -> FactoredRecord:
        """Inputs [n, t, i + bias] and output gradients [n, t, o]; 2-D inputs have t = 1."""
        return factored(call.input, call.gradients[0], parameters, ids, mask)

    def split(self, module: nn.Module, parameters: Sequence[str], gradients: Tensor) -> dict[str, Tensor]:
        """Weight columns first, then the bias column."""
        out = {}
        if "bias" in parameters:
            out["bias"] = gradients[:, :, -1]
        if "weight" in parameters:
            weight = gradients[:, :, :-1] if "bias" in parameters else gradients
            out["weight"] = weight.mT if _is_transposed(module) else weight
        return out


def factored(
    inputs: Tensor, gradients: Tensor, parameters: Sequence[str], ids: Tensor, mask: Tensor | None
) -> FactoredRecord:
    """Bring [n, ..., i] and [n, ..., o] to [n, t, i + bias] and [n, t, o]."""
    n, o = gradients.shape[0], gradients.shape[-1]
    gradients = widened(gradients).reshape(n, -1, o)
    t = gradients.shape[1]
    inputs = widened(inputs).reshape(n, t, -1)
    if "bias" in parameters:
        ones = inputs.new_ones(n, t, 1)
        inputs = torch.cat([inputs, ones], dim=-1) if "weight" in parameters else ones
    fits = mask is not None and tuple(mask.shape) == (n, t)
    return FactoredRecord(ids, inputs, gradients, mask if fits else None)


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D (weight [i, o]); without that package imported there can be none."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and isinstance(module, utils.Conv1D)
