"""Convolutions, as matrix products over unfolded patches: nn.Conv1d, nn.Conv2d, nn.Conv3d."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.capture.layers.base import LayerCall, LayerRule, per_example, widened
from lightning_influence.capture.layers.linear import extended
from lightning_influence.capture.record import DenseRecord, FactoredRecord


class ConvRule(LayerRule):
    """With the patch under output position t as a_t, a convolution is a linear layer over positions.

    Any padding mode, stride and dilation. A grouped convolution has one small matrix per group; its gradient is
    formed at once, [n, o, i / groups].
    """

    module_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    kind = "conv"

    def shape(self, module: nn.Module, parameters: Sequence[str]) -> tuple[int, ...]:
        """(o, i / groups * kernel + bias)."""
        weight = module.get_parameter("weight")
        return (weight.shape[0], weight[0].numel() * ("weight" in parameters) + ("bias" in parameters))

    def record(
        self,
        module: nn.Module,
        parameters: Sequence[str],
        call: LayerCall,
        ids: Tensor,
        mask: Tensor | None,
    ) -> FactoredRecord | DenseRecord:
        """Patches [n, t, i + bias] and output gradients [n, t, o] over the output's positions t."""
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        gradients = widened(call.gradients[0]).flatten(2).mT
        n, t, o = gradients.shape
        patches = _patches(module, per_example(widened(call.input), n))
        groups = module.groups
        if groups == 1:
            inputs = extended(patches.flatten(2), n, t, "weight" in parameters, "bias" in parameters)
            return FactoredRecord(ids, inputs, gradients)
        parts = []
        if "weight" in parameters:
            a = patches.reshape(n, t, groups, -1)
            s = gradients.reshape(n, t, groups, o // groups)
            parts.append(torch.einsum("ntgo,ntgi->ngoi", s, a).reshape(n, o, -1))
        if "bias" in parameters:
            parts.append(gradients.sum(1).unsqueeze(-1))
        return DenseRecord(ids, torch.cat(parts, dim=2))

    def split(self, module: nn.Module, parameters: Sequence[str], gradients: Tensor) -> dict[str, Tensor]:
        """Weight columns first, then the bias column."""
        out = {}
        if "weight" in parameters:
            weight = gradients[:, :, :-1] if "bias" in parameters else gradients
            out["weight"] = weight.reshape(-1, *module.get_parameter("weight").shape)
        if "bias" in parameters:
            out["bias"] = gradients[:, :, -1]
        return out


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    """The input under each output position: [n, c, *space] -> [n, t, c, kernel elements]."""
    # Pairs from the last dimension on, also for padding="same"; the layer pads with them itself unless "zeros".
    pads = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = F.pad(inputs, pads, mode=mode)
    for d, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        windows = windows.unfold(2 + d, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    space = windows.dim() // 2 - 1
    n, c = windows.shape[:2]
    ordered = windows.permute(0, *range(2, 2 + space), 1, *range(2 + space, 2 + 2 * space))
    t = ordered.shape[1 : 1 + space].numel()
    return ordered.reshape(n, t, c, -1)
