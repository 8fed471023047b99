"""Whether two examples hold the same values, from a few bytes of each."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence.capture.batches import leaves


def example_digest(example: Any) -> bytes | None:
    """Sixteen bytes, equal for examples of equal values; None for one whose values cannot be told.

    Told are tensors, arrays and images, strings, bytes, numbers and None, in any containers.

    >>> example_digest((1, "a")) == example_digest([1, "a"])
    True
    >>> example_digest((1, 23)) == example_digest((12, 3))
    False
    """
    hashed = hashlib.blake2b(digest_size=16)
    for leaf in leaves(example):
        described = _described(leaf)
        if described is None:
            return None
        hashed.update(len(described).to_bytes(8, "big") + described)  # so that 1, 23 is not 12, 3
    return hashed.digest()


def _described(leaf: Any) -> bytes | None:
    if isinstance(leaf, Tensor):
        values = leaf.detach().cpu().contiguous().reshape(-1)
        return f"{leaf.dtype} {list(leaf.shape)}".encode() + values.view(torch.uint8).numpy().tobytes()
    if hasattr(leaf, "__array_interface__"):  # numpy, images
        array = np.asarray(leaf)
        return None if array.dtype == object else f"{array.dtype} {array.shape}".encode() + array.tobytes()
    if leaf is None or isinstance(leaf, str | bytes | int | float | complex):
        return repr(leaf).encode()
    return None
