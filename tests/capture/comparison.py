"""Gradients of a captured batch beside those of one backward pass per example."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.capture import GradientCapture, parameter_gradients
from tests.capture.models import take
from tests.oracles import example_gradients

Losses = Callable[[nn.Module, Any], Tensor]


def gradients(
    model: nn.Module, batch: Any, losses: Losses, components: Any = None, n: int | None = None
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with GradientCapture(model, components) as capture:
        for component, record in zip(capture.components, capture.record(batch, losses, n=n), strict=True):
            found |= parameter_gradients(model, component, record.example_gradients())
    return found


def truth(
    model: nn.Module, batch: Any, losses: Losses, alone: Callable[[Any, int], Any], n: int, names: Any = None
) -> dict[str, Tensor]:
    model = copy.deepcopy(model).eval()
    parameters = {
        name: p for name, p in model.named_parameters() if (p.requires_grad if names is None else name in names)
    }
    return example_gradients(parameters, lambda k: losses(model, alone(batch, k)).sum(), n)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def one_text(batch: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    return take(batch, [k])


def one_point(batch: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    return batch[0][k : k + 1], batch[1][k : k + 1]
