from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lightning_influence.capture import GradientCapture
from lightning_influence.capture.layers import FallbackRule, NormRule, rule_for
from tests.oracles import example_gradients

# One of each way in which transformers writes the formula: the order of casts, w or 1 + w, names of eps.
NAMES = [
    "llama.LlamaRMSNorm",
    "gpt_oss.GptOssRMSNorm",
    "gemma2.Gemma2RMSNorm",
    "gemma3n.Gemma3nRMSNorm",
    "mamba.MambaRMSNorm",
    "moshi.MoshiRMSNorm",
    "nemotron_h.NemotronHRMSNorm",
    "helium.HeliumRMSNorm",
    "idefics.IdeficsRMSNorm",
    "qwen3_next.Qwen3NextRMSNorm",
]


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).sin().flatten(1).sum(1)


def recorded(layer: nn.Module, batch: Tensor) -> Tensor:
    with GradientCapture(layer) as capture:
        [record] = capture.record(batch, losses)
    return record.example_gradients()


@pytest.mark.parametrize("name", NAMES)
def test_the_norms_of_transformers(name: str) -> None:
    file, cls = name.split(".")
    layer = getattr(importlib.import_module(f"transformers.models.{file}.modeling_{file}"), cls)(6)
    with torch.no_grad():
        layer.weight.add_(torch.linspace(-1, 1, 6))
    batch = torch.randn(3, 5, 6)
    assert isinstance(rule_for(layer), NormRule)
    truth = example_gradients({"weight": layer.weight}, lambda k: losses(layer, batch[k : k + 1]).sum(), 3)
    torch.testing.assert_close(recorded(layer, batch)[:, 0], truth["weight"], rtol=1e-5, atol=1e-5)


class RMSNorm(LlamaRMSNorm):
    """Named like one of transformers, by someone else."""


class Gated(LlamaRMSNorm):
    def forward(self, hidden: Tensor, gate: Any = None) -> Tensor:
        return super().forward(hidden)


Gated.__name__, Gated.__module__ = "GatedRMSNorm", LlamaRMSNorm.__module__


def patched() -> nn.Module:
    layer = LlamaRMSNorm(4)
    layer.forward = lambda hidden: hidden * layer.weight
    return layer


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (nn.LayerNorm(4), NormRule),
        (nn.RMSNorm(4), NormRule),
        (LlamaRMSNorm(4), NormRule),
        (RMSNorm(4), FallbackRule),
        (Gated(4), FallbackRule),
        (patched(), FallbackRule),
        (T5LayerNorm(4), FallbackRule),
        (nn.GroupNorm(2, 4), FallbackRule),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_which_norms_are_covered_by_the_formula(layer: nn.Module, rule: type) -> None:
    assert isinstance(rule_for(layer), rule)
    truth = example_gradients(dict(layer.named_parameters()), lambda k: losses(layer, BATCH[k : k + 1]).sum(), 2)
    expected = torch.cat([gradient.flatten(1) for gradient in truth.values()], dim=1)
    torch.testing.assert_close(recorded(layer, BATCH).flatten(1), expected, rtol=1e-5, atol=1e-5)


BATCH = torch.randn(2, 4)


def test_the_rows_are_weight_and_bias() -> None:
    layer = nn.LayerNorm((2, 3))
    gradients = torch.randn(4, 2, 6)
    parts = NormRule().split(layer, ("weight", "bias"), gradients)
    assert torch.equal(parts["weight"], gradients[:, 0].reshape(4, 2, 3))
    assert torch.equal(parts["bias"], gradients[:, 1].reshape(4, 2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_inputs_without_an_eps(dtype: torch.dtype) -> None:
    """An eps of None stands for the spacing of a number format, which decides when the input is small."""
    layer, batch = nn.RMSNorm(4), torch.full((2, 4), 1e-3)
    found = recorded(layer.to(dtype), batch.to(dtype))
    truth = example_gradients({"weight": layer.weight}, lambda k: losses(layer, batch[k : k + 1].to(dtype)).sum(), 2)
    torch.testing.assert_close(found[:, 0], truth["weight"].float(), rtol=0.02, atol=0)
