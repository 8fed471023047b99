"""Layers that multiply by a matrix at every position: nn.Linear and the Conv1D of transformers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_influence.capture.layers.base import LayerCall, LayerRule, is_plain, per_example, widened
from lightning_influence.capture.record import FactoredRecord


class LinearRule(LayerRule):
    """``y_t = W a_t + b``: the gradient of an example is the sum over t of s_t (a_t, 1)^T."""

    module_types = (nn.Linear,)
    kind = "linear"

    def handles(self, module: nn.Module) -> bool:
        """nn.Linear, or the transposed layer of transformers' GPT-2."""
        return is_plain(module, (*self.module_types, *_transposed()))

    def shape(self, module: nn.Module, parameters: Sequence[str]) -> tuple[int, ...]:
        """(o, i + bias); a bias alone is (o, 1)."""
        weight = module.get_parameter("weight")
        o, i = reversed(weight.shape) if isinstance(module, _transposed()) else weight.shape
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
        if "weight" in parameters:
            weight = gradients[:, :, :-1] if "bias" in parameters else gradients
            out["weight"] = weight.mT if isinstance(module, _transposed()) else weight
        if "bias" in parameters:
            out["bias"] = gradients[:, :, -1]
        return out


def factored(
    inputs: Tensor, gradients: Tensor, parameters: Sequence[str], ids: Tensor, mask: Tensor | None
) -> FactoredRecord:
    """Bring [n or 1, ..., i] and [n, ..., o] to [n, t, i + bias] and [n, t, o]."""
    n, o = gradients.shape[0], gradients.shape[-1]
    gradients = widened(gradients).reshape(n, -1, o)
    t = gradients.shape[1]
    if "weight" in parameters:
        inputs = per_example(widened(inputs), n).reshape(n, t, -1)
    else:
        inputs = gradients.new_empty(n, t, 0)
    if "bias" in parameters:
        inputs = torch.cat([inputs, inputs.new_ones(n, t, 1)], dim=-1)
    fits = mask is not None and tuple(mask.shape) == (n, t)
    return FactoredRecord(ids, inputs, gradients, mask if fits else None)


def _transposed() -> tuple[type[nn.Module], ...]:
    """transformers' Conv1D (weight [i, o]); without that package imported there can be none."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return () if utils is None else (utils.Conv1D,)
