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
        gradients = widened(call.gradients[0]).reshape(len(ids), -1, call.gradients[0].shape[-1])
        n, t, _ = gradients.shape
        weight, bias = "weight" in parameters, "bias" in parameters
        inputs = call.once(("linear", n, t, weight, bias), lambda: extended(call.input, n, t, weight, bias))
        fits = mask is not None and tuple(mask.shape) == (n, t)
        return FactoredRecord(ids, inputs, gradients, mask if fits else None)

    def split(self, module: nn.Module, parameters: Sequence[str], gradients: Tensor) -> dict[str, Tensor]:
        """Weight columns first, then the bias column."""
        out = {}
        if "weight" in parameters:
            weight = gradients[:, :, :-1] if "bias" in parameters else gradients
            out["weight"] = weight.mT if isinstance(module, _transposed()) else weight
        if "bias" in parameters:
            out["bias"] = gradients[:, :, -1]
        return out


def extended(inputs: Tensor, n: int, t: int, weight: bool, bias: bool) -> Tensor:
    """[n or 1, ..., i] as [n, t, i + bias], with a column of ones for the bias; [n, t, 1] for a bias alone."""
    rows = per_example(widened(inputs), n).reshape(n, t, -1) if weight else widened(inputs).new_empty(n, t, 0)
    return torch.cat([rows, rows.new_ones(n, t, 1)], dim=-1) if bias else rows


def _transposed() -> tuple[type[nn.Module], ...]:
    """transformers' Conv1D (weight [i, o]); without that package imported there can be none."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return () if utils is None else (utils.Conv1D,)
