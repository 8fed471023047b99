"""What a batch is, whatever its layout: its size, its device."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def batch_size(batch: Any) -> int:
    """First dimension of the first tensor of a batch.

    Raises:
        ValueError: If there is no tensor with a dimension.
    """
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError(f"a batch of type {type(batch).__name__} holds no tensor; expected tensors with examples first.")


def leaves(batch: Any) -> list[Any]:
    """Everything in a batch that is not a container."""
    found: list[Any] = []
    for leaf in pytree.tree_leaves(batch):
        found += leaves(dict(leaf)) if isinstance(leaf, UserDict) else [leaf]
    return found


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    return map_tensors(batch, lambda tensor: tensor.to(device))


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The batch with a function applied to its tensors, in containers of the same types."""

    def apply(leaf: Any) -> Any:
        if isinstance(leaf, UserDict):  # the BatchEncoding of transformers, which pytree takes for a leaf
            twin = copy.copy(leaf)
            twin.data = {key: map_tensors(value, function) for key, value in leaf.items()}
            return twin
        return function(leaf) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(apply, batch)
