"""Whether a model still has the weights that a curvature was fitted on, from two numbers of each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_influence.capture import Component

Weights: TypeAlias = Mapping[str, tuple[torch.dtype, Tensor]]

SAME = 1e-9  # relative difference of sums in float64 on different devices
NARROWED = 1e-2  # of sums of the same weights in two precisions


def weights_of(model: nn.Module, components: Sequence[Component]) -> Weights:
    """Of each parameter its dtype, its length and that of its positive part, float64 [2] on the CPU."""
    names = [name for component in components for name in component.parameters]
    found = [model.get_parameter(name).detach().flatten() for name in names]
    lengths = [
        torch.linalg.vector_norm(part.float() if not part.is_floating_point() else part, dtype=torch.float64)
        for flat in found
        for part in (flat, flat.clamp_min(0))
    ]
    sums = torch.stack(lengths).cpu().reshape(-1, 2) if lengths else torch.zeros(0, 2)
    return {name: (flat.dtype, pair) for name, flat, pair in zip(names, found, sums, strict=True)}


def changed(fitted: Weights, now: Weights) -> list[str]:
    """Names of the parameters that are known to be others."""
    odd = []
    for name in fitted.keys() & now.keys():
        (dtype, before), (other, after) = fitted[name], now[name]
        if not torch.allclose(before, after, rtol=SAME if dtype == other else NARROWED, atol=0, equal_nan=True):
            odd.append(name)
    return sorted(odd)
