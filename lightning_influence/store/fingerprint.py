"""One short name for the weights of a model."""

from __future__ import annotations

import hashlib
import json

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
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        described = [name, list(parameter.shape), str(parameter.dtype)]
        digest.update(json.dumps(described).encode() + b"\n")
        digest.update(_bytes(parameter))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """The elements in row-major order, whatever the strides."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
