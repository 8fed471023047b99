"""Passes through a model that leave it, and the random states, as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Let the body run a model forward and backward, then put everything back.

    Inside, the model is in evaluation mode, gradients are enabled, ``self.log`` of Lightning does nothing, autocast
    is off and compiled modules run eagerly. Afterwards, also after an exception: random states (python, numpy,
    torch, the model's device), training flags of every submodule, ``requires_grad``, ``.grad`` (gradient
    accumulation!), buffers and torchmetrics states are what they were. Two things are not put back: attributes
    that the user's own ``forward`` changes, and generators that a dataset keeps for itself.

    Batches and activations made inside ``torch.inference_mode`` cannot be used here: load the data again.

    Args:
        model: The model to protect.

    Raises:
        RuntimeError: If a part of the model is compiled and this torch cannot run it eagerly (before 2.6).
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with ExitStack() as stack:
        for guard in (_modules, _parameters, _buffers, _metrics, _muted, _eager):
            stack.enter_context(guard(model))
        stack.enter_context(_random_states(device))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in {"cpu", device.type}:
            stack.enter_context(no_autocast(device_type))
        yield


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast switched off on a type of device, where it exists there at all."""
    if torch.amp.autocast_mode.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@contextmanager
def _random_states(device: torch.device) -> Iterator[None]:
    # Lightning's isolate_rng does not restore when its body raises.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _modules(model: nn.Module) -> Iterator[None]:
    """Evaluation mode by attribute: ``.train()`` recurses and is overridden by modules that stay frozen."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _parameters(model: nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextmanager
def _buffers(model: nn.Module) -> Iterator[None]:
    before = [(m, name, b, b.detach().clone()) for m in model.modules() for name, b in _own_buffers(m)]
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            module._buffers[name] = _put_back(buffer, value)


def _own_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]


def _put_back(tensor: Tensor, value: Tensor) -> Tensor:
    """The same tensor object with its old values; untouched ones are not written to."""
    with torch.no_grad():
        if not torch.equal(tensor, value):
            tensor.copy_(value)
    return tensor


_METRIC_CACHES = ("_update_count", "_computed", "_forward_cache", "_cache", "_is_synced", "_to_sync")
_COLLECTION_CACHES = ("_groups", "_groups_checked", "_state_is_copy")


@contextmanager
def _metrics(model: nn.Module) -> Iterator[None]:
    """States of torchmetrics are plain attributes, not buffers, and those of a collection share tensors."""
    before = [
        (module, name, module.__dict__[name], _copy(module.__dict__[name]))
        for module in model.modules()
        for name in _metric_attributes(module)
        if name in module.__dict__
    ]
    try:
        yield
    finally:
        for module, name, state, value in before:
            module.__dict__[name] = _restored(state, value)


def _metric_attributes(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, Metric):
        return (*module._defaults, *_METRIC_CACHES)
    return _COLLECTION_CACHES if isinstance(module, MetricCollection) else ()


def _copy(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, list):
        return list(state)
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return state


def _restored(state: Any, value: Any) -> Any:
    if isinstance(state, Tensor):
        return _put_back(state, value)
    if isinstance(state, list):
        state[:] = value
        return state
    return value


@contextmanager
def _muted(model: nn.Module) -> Iterator[None]:
    """``self.log`` raises in half of the hooks and pollutes ``callback_metrics`` in the other half."""
    before = [
        (module, name, module.__dict__.get(name))
        for module in model.modules()
        for name in ("log", "log_dict")
        if callable(getattr(module, "log_dict", None))
    ]
    try:
        for module, name, _ in before:
            module.__dict__[name] = _log_nothing
        yield
    finally:
        for module, name, method in before:
            del module.__dict__[name]
            if method is not None:
                module.__dict__[name] = method


def _log_nothing(*_: Any, **__: Any) -> None:
    """Stand in for ``log`` and ``log_dict``."""


def _eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Run without ``torch.compile``: in a compiled module that is warm, new hooks silently never fire."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()  # nothing can be compiled, and importing it takes seconds
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is not None:
        context: AbstractContextManager[Any] = stance("force_eager")
        return context
    if any(_is_compiled(module) for module in model.modules()):
        raise RuntimeError(
            f"{type(model).__name__} is compiled: expected torch >= 2.6, which can run compiled modules eagerly "
            f"for a while, and this is torch {torch.__version__}. Update torch, or record without torch.compile."
        )
    return nullcontext()


def _is_compiled(module: nn.Module) -> bool:
    marks = ("_orig_mod", "_compiled_call_impl", "_compiler_ctx")
    return any(getattr(module, mark, None) is not None for mark in marks)
