"""What a batch is, whatever its layout: its size, its device, one example of it."""

from __future__ import annotations

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


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    return _map(batch, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


def examples(batch: Any, index: list[int]) -> Any:
    """The batch with only some of its examples: every tensor or list as long as the batch is cut."""
    n = batch_size(batch)

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == n:
            return leaf[index]
        return leaf

    return _map(batch, cut)


def leaves(batch: Any) -> list[Any]:
    """Everything in a batch that is not a container."""
    return pytree.tree_leaves(_plain(batch))


def _map(batch: Any, function: Any) -> Any:
    return pytree.tree_map(function, _plain(batch))


def _plain(batch: Any) -> Any:
    # BatchEncoding and its like are user dictionaries, which pytree takes for leaves.
    data = getattr(batch, "data", None)
    return dict(data) if isinstance(data, dict) and hasattr(batch, "keys") else batch
