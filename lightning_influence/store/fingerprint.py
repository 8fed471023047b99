"""One short name for the weights of a model, or for any named tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of the parameters, sorted by name; 64 hex digits.

    The device, the mode and ``requires_grad`` do not matter; tied parameters count once, under their first
    name. Buffers are left out: running statistics differ between the ranks of one and the same run.

    >>> model = nn.Linear(2, 1)
    >>> model_fingerprint(model) == model_fingerprint(model.eval())
    True
    >>> _ = nn.init.constant_(model.bias, 7.0)
    >>> before = model_fingerprint(model)
    >>> _ = nn.init.constant_(model.bias, 8.0)
    >>> model_fingerprint(model) == before
    False
    """
    return _digest(model.named_parameters())


def tensors_fingerprint(tensors: Mapping[str, Tensor], described: Any = None) -> str:
    """The same of named tensors, and of what else they are known by, in JSON's types.

    >>> one = tensors_fingerprint({"a": torch.ones(2)}, {"damping": 0.1})
    >>> one == tensors_fingerprint({"a": torch.ones(2)}, {"damping": 0.2})
    False
    """
    return _digest(tensors.items(), json.dumps(described, sort_keys=True).encode())


def _digest(tensors: Iterable[tuple[str, Tensor]], first: bytes = b"") -> str:
    digest = hashlib.sha256(first)
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        described = [name, list(tensor.shape), str(tensor.dtype)]
        digest.update(json.dumps(described).encode() + b"\n")
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """The elements in row-major order, whatever the strides."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
