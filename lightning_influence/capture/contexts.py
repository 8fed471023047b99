"""States of torch that a recording needs, each entered for as long as it is needed and then undone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, restored module by module: .train() would also wake layers frozen in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eager() -> Iterator[None]:
    """Compiled modules skip hooks that were attached after compilation, so they run uncompiled here."""
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is None or "torch._dynamo" not in sys.modules:  # importing it takes seconds; nothing is compiled yet
        yield
    else:
        with stance("force_eager"):
            yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Outside autocast, which would silently take sums and products in half precision."""
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    devices = {"cpu", "cuda" if accelerator is None else accelerator.type}
    with ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
