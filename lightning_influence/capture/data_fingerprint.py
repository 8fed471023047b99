"""One short name for a dataset, so that positions recorded in one run are not read in another dataset."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def data_fingerprint(dataset: Any, samples: int = 16) -> str:
    """16 hexadecimal digits over the length of a map-style dataset and the values of some evenly spread examples.

    A shuffled split differs from another with near certainty; a dataset that was changed in one place may not.
    Random augmentation is drawn from the same seed every time, and random states are left as they were. Values
    other than numbers, strings, bytes, tensors and arrays count by their type only.

    >>> data_fingerprint([1, 2, 3]) == data_fingerprint((1, 2, 3))
    True
    >>> data_fingerprint([1, 2, 3]) == data_fingerprint([3, 2, 1])
    False

    Args:
        dataset: Anything with ``__len__`` and ``__getitem__``.
        samples: Number of examples that are read.
    """
    n = len(dataset)
    digest = hashlib.sha256(str(n).encode())
    with _seeded():
        for k in sorted({round(i * (n - 1) / max(1, samples - 1)) for i in range(samples)} if n else ()):
            for leaf in _leaves(dataset[k]):
                digest.update(_described(leaf))
    return digest.hexdigest()[:16]


def _leaves(example: Any) -> Iterator[Any]:
    if isinstance(example, Mapping):
        for key in example:
            yield str(key)
            yield from _leaves(example[key])
    elif isinstance(example, list | tuple):
        for item in example:
            yield from _leaves(item)
    else:
        yield example


def _described(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):
        values = leaf.detach().cpu().contiguous().reshape(-1)
        return f"{leaf.dtype} {list(leaf.shape)}".encode() + values.view(torch.uint8).numpy().tobytes()
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype != object:
        return f"{leaf.dtype} {list(leaf.shape)}".encode() + np.ascontiguousarray(leaf).tobytes()
    if leaf is None or isinstance(leaf, str | bytes | int | float | complex):
        return repr(leaf).encode()
    return type(leaf).__qualname__.encode()


@contextmanager
def _seeded() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.default_generator.manual_seed(0)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
