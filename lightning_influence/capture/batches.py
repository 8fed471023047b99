"""What a batch is, whatever its layout: its size, its device, its examples."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
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
    return _map(batch, lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


def examples(batch: Any, rows: slice | Sequence[int]) -> Any:
    """Some examples of a batch, cut out of all that has one row or one item for each of them.

    >>> examples({"x": torch.arange(3), "names": ["a", "b", "c"], "scale": 2.0}, slice(1, 2))
    {'x': tensor([1]), 'names': ['b'], 'scale': 2.0}

    Raises:
        ValueError: If something in it is not laid out by examples, or nothing is.
    """
    n = batch_size(batch)

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, list | tuple):
            return leaf[rows] if isinstance(rows, slice) else type(leaf)([leaf[k] for k in rows])
        if not isinstance(leaf, Tensor | np.ndarray) or not leaf.ndim:
            return leaf
        if leaf.shape[0] != n:
            raise ValueError(f"it holds an array of shape {tuple(leaf.shape)}, and {n} examples.")
        return leaf[rows if isinstance(rows, slice) else list(rows)]

    def items(part: Any) -> bool:
        found = isinstance(part, list | tuple) and len(part) == n
        return found and not any(isinstance(leaf, Tensor | np.ndarray) for leaf in leaves(part))

    return _map(batch, cut, items)


def explain_dtypes(batch: Any, model: nn.Module, error: RuntimeError) -> None:
    """Say so where a model cannot be run on numbers of another precision than its own.

    Raises:
        ValueError: If the batch has a floating-point dtype that no parameter has.
    """
    given = {leaf.dtype for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.is_floating_point()}
    own = {parameter.dtype for parameter in model.parameters()}
    if given - own:
        names = [" and ".join(sorted(str(dtype) for dtype in dtypes)) for dtypes in (given, own)]
        raise ValueError(
            f"{type(model).__name__} could not be run: the batch holds {names[0]}, its parameters are {names[1]} "
            f"({error}). Expected data of the model's dtype: convert it in the dataset, or convert the model."
        ) from error


def _map(batch: Any, function: Callable[[Any], Any], is_leaf: Callable[[Any], bool] | None = None) -> Any:
    def apply(leaf: Any) -> Any:
        if isinstance(leaf, UserDict):  # the BatchEncoding of transformers, which pytree takes for a leaf
            twin = copy.copy(leaf)
            twin.data = {key: _map(value, function, is_leaf) for key, value in leaf.items()}
            return twin
        return function(leaf)

    return pytree.tree_map(apply, batch, is_leaf=is_leaf)
