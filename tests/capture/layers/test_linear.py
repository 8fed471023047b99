from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_influence.capture import GradientCapture
from lightning_influence.capture.layers import LinearRule, rule_for
from lightning_influence.capture.layers.linear import factored
from lightning_influence.capture.record import FactoredRecord
from tests.cases import only


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().flatten(1).sum(1)


def recorded(layer: nn.Module, batch: Tensor, mask: Tensor | None = None) -> FactoredRecord:
    with GradientCapture(layer) as capture:
        [record] = capture.record(batch, losses, mask=mask)
    assert isinstance(record, FactoredRecord)
    return record


@pytest.mark.parametrize("build", [nn.Linear, lambda i, o, **kw: Conv1D(o, i)], ids=["linear", "conv1d"])
def test_the_bias_is_the_last_column(build: object) -> None:
    layer, batch = build(3, 4), torch.randn(2, 5, 3)
    record = recorded(layer, batch)
    assert record.sizes == (2, 5, 4, 4)
    torch.testing.assert_close(record.inputs, torch.cat([batch, torch.ones(2, 5, 1)], dim=2))
    torch.testing.assert_close(record.gradients, 2 * layer(batch).detach())
    parts = LinearRule().split(layer, ("weight", "bias"), record.example_gradients())
    assert list(parts) == ["weight", "bias"]
    assert parts["weight"].shape == (2, *layer.weight.shape)
    assert parts["bias"].shape == (2, 4)


def test_only_what_is_covered_is_kept() -> None:
    batch = torch.randn(2, 5, 3)
    assert recorded(only(nn.Linear(3, 4), "weight"), batch).inputs.shape == (2, 5, 3)
    assert recorded(nn.Linear(3, 4, bias=False), batch).inputs.shape == (2, 5, 3)
    assert torch.equal(recorded(only(nn.Linear(3, 4), "bias"), batch).inputs, torch.ones(2, 5, 1))


def test_inputs_are_not_copied_without_a_bias() -> None:
    batch = torch.randn(2, 5, 3)
    assert recorded(nn.Linear(3, 4, bias=False), batch).inputs.data_ptr() == batch.data_ptr()


@pytest.mark.parametrize(("shape", "kept"), [((2, 5), True), ((2, 4), False), ((3, 5), False)])
def test_a_mask_is_kept_where_it_fits(shape: tuple[int, int], kept: bool) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    record = recorded(nn.Linear(3, 4), torch.randn(2, 5, 3), mask)
    assert (record.mask is mask) == kept


def test_dimensions_between_examples_and_width_are_positions() -> None:
    inputs, gradients = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 6)
    record = factored(inputs, gradients, ("weight",), torch.arange(2), None)
    assert record.sizes == (2, 12, 5, 6)
    assert factored(inputs[:1], gradients, ("weight",), torch.arange(2), None).sizes == (2, 12, 5, 6)


def test_without_transformers_there_is_no_transposed_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(rule_for(Conv1D(3, 4)), LinearRule)
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils")
    assert not isinstance(rule_for(Conv1D(3, 4)), LinearRule)
    assert isinstance(rule_for(nn.Linear(3, 4)), LinearRule)
