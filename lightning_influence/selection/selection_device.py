"""Where a rule looks at a pool: on the GPU of the model, where that is worth it and there is room."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

LEAST = 2**25  # bytes of features: of fewer a processor has read all before a GPU has started on them
SHARE = 8  # of the free memory one part in so many: a screened copy and what a rule keeps come on top


class Placeable(Protocol):
    """What a rule is given: features on a device, with all that belongs to them."""

    @property
    def features(self) -> Tensor:
        """Of the pool, [n, r]."""
        ...

    def to(self, device: torch.device) -> Placeable:
        """The same on a device."""
        ...


Known = TypeVar("Known", bound=Placeable)


def selection_device(device: torch.device, needed: int, free: int | None) -> torch.device:
    """The device for a rule.

    Sums over a pool are taken in float64, which of the accelerators CUDA (and ROCm) alone is sure to have; others, such
    as MPS, leave the choice to the CPU.

    Args:
        device: Of the model.
        needed: Bytes of the features in float64.
        free: Bytes that the device has left; None where it does not say.

    >>> [selection_device(torch.device(name), 2**30, free=2**33) for name in ("cuda:1", "mps")]
    [device(type='cuda', index=1), device(type='cpu')]
    """
    fits = free is not None and LEAST <= needed <= free // SHARE
    return device if device.type == "cuda" and fits else torch.device("cpu")


def on_its_device(known: Known, model: nn.Module) -> Known:
    """A pool where the rule shall look at it; what is chosen there is what is chosen on the CPU, up to rounding."""
    device = next(model.parameters()).device
    if torch.are_deterministic_algorithms_enabled():  # sums along rows, which rules take, are refused on a GPU then
        return known
    goal = selection_device(device, 8 * known.features.numel(), _free(device))
    return known if goal == known.features.device else known.to(goal)  # type: ignore[return-value]


def _free(device: torch.device) -> int | None:
    """Bytes that the device has left, with those that torch holds for tensors to come; None where it is not known."""
    if device.type != "cuda":
        return None
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle
