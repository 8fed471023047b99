from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence.capture import find_components, parameter_gradients
from lightning_influence.capture.layers import FallbackRule, rule_for
from lightning_influence.errors import UnsupportedLayerError
from tests.capture.comparison import assert_same, gradients, truth
from tests.cases import FALLBACK, LayerCase


def normal(n: int) -> Tensor:
    return torch.randn(n, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).sin().flatten(1).sum(1)


def check(model: nn.Module, n: int = 4) -> None:
    model = model.double()
    assert_same(gradients(model, normal(n), losses), truth(model, normal(n), losses, lambda b, k: b[k : k + 1], n))


@pytest.mark.parametrize("case", FALLBACK, ids=str)
def test_the_vector_is_cut_in_the_order_of_the_parameters(case: LayerCase) -> None:
    model = case.model()
    for component in find_components(model):
        if component.kind == "other":
            parts = parameter_gradients(model, component, torch.arange(2 * component.numel).reshape(2, -1))
            assert torch.cat([part.flatten(1) for part in parts.values()], dim=1).tolist() == [
                list(range(component.numel)),
                list(range(component.numel, 2 * component.numel)),
            ]


class Raw(nn.Module):
    """A parameter under two names, one that a child uses too, and one that is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.again = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.inner = nn.Linear(3, 3)
        self.shift, self.idle = self.inner.bias, nn.Parameter(torch.ones(2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs * self.scale).tanh() * self.again + self.shift


def test_parameters_under_several_names() -> None:
    check(Raw())


class Several(nn.Module):
    """Returns the same tensor twice, a part of another, a scalar, and something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        first = (inputs * self.scale).tanh()
        second = first * self.scale
        return {"states": (first, second), "last": second, "size": first.mean(), "name": "several"}


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.several = Several()

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.several(inputs)
        return output["states"][0] + output["states"][1] ** 2 + output["last"]


def test_outputs_that_depend_on_each_other() -> None:
    check(Reader())


def test_a_scalar_output_that_the_loss_uses_mixes_examples() -> None:
    class Coupled(Reader):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * self.several(inputs)["size"]

    with pytest.raises(UnsupportedLayerError, match=r"several: an output has shape \(\); expected the 4 examples"):
        gradients(Coupled().double(), normal(4), losses)


class Shared(nn.Module):
    """An argument that all examples share, [t, t]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mixed()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs, torch.linspace(0, 1, 16, dtype=inputs.dtype).reshape(4, 4))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, inputs: Tensor, mixture: Tensor) -> Tensor:
        return mixture @ inputs * self.scale


def test_a_shared_argument() -> None:
    check(Shared(), 3)


REFUSED = r"inner: called again on single examples it returned something else than for the batch"


def test_a_shared_argument_that_looks_like_one_for_each_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=REFUSED):
        gradients(Shared().double(), normal(4), losses)


class Inner(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale + torch.randn_like(inputs)


class Counting(Noisy):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return inputs * self.scale * self.calls


@pytest.mark.parametrize(
    "build",
    [Noisy, Counting, lambda: nn.BatchNorm1d(4, track_running_stats=False)],
    ids=["random", "with a state", "batch statistics"],
)
def test_modules_that_are_not_functions_of_one_example_are_refused(build: Any) -> None:
    with pytest.raises(UnsupportedLayerError, match=REFUSED):
        gradients(Inner(build()).double(), normal(4), losses)


def test_a_module_that_writes_to_its_buffers() -> None:
    class Writing(Noisy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, inputs: Tensor) -> Tensor:
            self.seen += 1
            return inputs * self.scale

    model = Inner(Writing())
    check(model)
    assert model.inner.seen == 1  # by the forward pass; the repeated calls had copies


def test_which_children_are_claimed() -> None:
    rule = FallbackRule()
    assert rule.claims_children(nn.MultiheadAttention(2, 1))
    assert rule.claims_children(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert not rule.claims_children(nn.TransformerEncoderLayer(2, 1))
    assert not rule.claims_children(nn.LSTM(2, 2))


def test_the_model_itself_can_be_attention() -> None:
    model = nn.MultiheadAttention(3, 1, batch_first=True).double()
    assert isinstance(rule_for(model), FallbackRule)

    def attended(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch, batch, batch, need_weights=False)[0].sin().flatten(1).sum(1)

    found = gradients(model, normal(3), attended)
    assert_same(found, truth(model, normal(3), attended, lambda b, k: b[k : k + 1], 3))


def test_states_that_are_part_of_the_output_count_once() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.LSTM(3, 3, batch_first=True)

        def forward(self, inputs: Tensor) -> Tensor:
            output, (hidden, cell) = self.cells(inputs)
            return torch.cat([output, hidden.transpose(0, 1), cell.transpose(0, 1)], dim=1)

    check(Last())
