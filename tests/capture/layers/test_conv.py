from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_influence.capture import GradientCapture, parameter_gradients
from lightning_influence.capture.layers import ConvRule, FallbackRule, rule_for
from lightning_influence.capture.layers.conv import _patches
from lightning_influence.capture.record import DenseRecord, FactoredRecord
from tests.oracles import example_gradients

modes = st.sampled_from(["zeros", "reflect", "replicate", "circular"])
small = st.integers(1, 3)


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).sin().flatten(1).sum(1)


@given(
    kernel=small, stride=small, dilation=small, padding=st.integers(0, 2), mode=modes, groups=small, bias=st.booleans()
)
def test_any_settings(
    kernel: int, stride: int, dilation: int, padding: int, mode: str, groups: int, bias: bool
) -> None:
    layer = nn.Conv2d(
        2 * groups, 3 * groups, (kernel, 2), (stride, 1), (padding, 1), (dilation, 1), groups, bias, mode
    ).double()
    batch = torch.randn(2, 2 * groups, 8, 4, dtype=torch.float64)
    with GradientCapture(layer) as capture:
        [component], [record] = capture.components, capture.record(batch, losses)
    found = parameter_gradients(layer, component, record.example_gradients())
    truth = example_gradients(dict(layer.named_parameters()), lambda k: losses(layer, batch[k : k + 1]).sum(), 2)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("groups", "kind"), [(1, FactoredRecord), (2, DenseRecord), (4, DenseRecord)])
def test_groups_have_no_common_factors(groups: int, kind: type) -> None:
    with GradientCapture(nn.Conv1d(4, 4, 3, groups=groups)) as capture:
        [component], [record] = capture.components, capture.record(torch.randn(2, 4, 6), losses)
    assert type(record) is kind
    assert component.shape == (4, 4 // groups * 3 + 1)


def test_patches_are_what_unfold_gives() -> None:
    layer, batch = nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 2), (1, 2)), torch.randn(2, 2, 6, 7)
    expected = F.unfold(batch, (3, 2), (1, 2), (1, 2), (2, 1)).mT
    assert torch.equal(_patches(layer, batch).flatten(2), expected)


def test_which_convolutions_are_covered_by_the_formula() -> None:
    class Causal(nn.Conv1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(F.pad(input, (2, 0)))

    assert isinstance(rule_for(nn.Conv1d(2, 2, 3)), ConvRule)
    assert isinstance(rule_for(Causal(2, 2, 3)), FallbackRule)
    assert isinstance(rule_for(nn.ConvTranspose1d(2, 2, 3)), FallbackRule)
