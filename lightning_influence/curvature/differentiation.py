"""What it takes to differentiate a model twice, and to notice where that cannot be done."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_influence.capture.batches import map_tensors
from lightning_influence.capture.guard import unchanged
from lightning_influence.capture.losses.base import logits_of


@contextmanager
def differentiated(model: nn.Module, names: list[str]) -> Iterator[list[Tensor]]:
    """The parameters of these names, and no others, require gradients."""
    with unchanged(model), sdpa_kernel(SDPBackend.MATH):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        chosen: list[Tensor] = [model.get_parameter(name).requires_grad_(True) for name in names]
        yield chosen


def cut_off(output: Any) -> tuple[Tensor, Tensor, Any]:
    """The logits in an output, a copy of them that begins a graph of its own, and the output with that copy."""
    logits = logits_of(output)
    leaf = logits.detach().requires_grad_()
    changed = map_tensors(output, lambda tensor: leaf if tensor is logits else tensor)
    if logits_of(changed) is not leaf:  # an object that is no container
        changed = copy.copy(output)
        changed.logits = leaf
    return logits, leaf, changed


def tracked_ones(losses: Tensor) -> Tensor:
    """Weights of the losses, which require a gradient: operations that cannot be differentiated twice show then."""
    return torch.ones_like(losses).requires_grad_()


def has_dead_end(tensors: Sequence[Tensor]) -> bool:
    """Whether the node that once_differentiable leaves behind is somewhere in the graph of these tensors."""
    ahead: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "Error":
            return True
        seen.add(node)
        ahead += [child for child, _ in node.next_functions]
    return False


def signature(model: nn.Module) -> list[tuple[str, Tensor]]:
    """A few numbers of every parameter and buffer that change when it does."""
    found = []
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and tensor.numel():
            flat = tensor.detach().flatten()
            sums = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in (flat, flat.clamp_min(0))]
            found.append((name, torch.stack(sums).cpu()))
    return found
