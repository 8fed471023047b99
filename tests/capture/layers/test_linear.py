from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_influence.capture import GradientCapture
from lightning_influence.capture.layers import LayerCall, LinearRule, rule_for
from lightning_influence.capture.record import FactoredRecord
from tests.cases import only

IDS = torch.arange(2)


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
    for shared in (inputs, inputs[:1]):
        record = LinearRule().record(nn.Linear(5, 6), ("weight",), LayerCall((shared,), {}, (gradients,)), IDS, None)
        assert record.sizes == (2, 12, 5, 6)
        expected = torch.einsum("npqo,npqi->noi", gradients, shared.expand(2, -1, -1, -1))
        torch.testing.assert_close(record.example_gradients(), expected)


def test_layers_that_multiply_one_input_share_what_is_kept_of_it() -> None:
    """Queries, keys and values of attention: one tensor, also when it is widened or extended by ones."""
    inputs, memo = torch.randn(2, 3, 5, dtype=torch.bfloat16), {}
    calls = [LayerCall((inputs,), {}, (torch.randn(2, 3, o),), memo=memo) for o in (4, 2)]
    for bias in (False, True):
        parameters = ("weight", "bias")[: 1 + bias]
        first, second = (LinearRule().record(nn.Linear(5, 4), parameters, call, IDS, None) for call in calls)
        assert first.inputs is second.inputs
        assert first.sizes == (2, 3, 5 + bias, 4)
    other = LayerCall((inputs.clone(),), {}, (torch.randn(2, 3, 4),), memo=memo)
    assert LinearRule().record(nn.Linear(5, 4), parameters, other, IDS, None).inputs is not first.inputs


def test_without_transformers_there_is_no_transposed_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(rule_for(Conv1D(3, 4)), LinearRule)
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils")
    assert not isinstance(rule_for(Conv1D(3, 4)), LinearRule)
    assert isinstance(rule_for(nn.Linear(3, 4)), LinearRule)
