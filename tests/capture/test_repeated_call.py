from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence.capture.repeated_call import RepeatedCall, fingerprint, parameter_slots, same
from tests.oracles import example_gradients


class Scaled(nn.Module):
    """y = tanh(x W) with the offset's sign taken from a Python number, so that vmap can be made to fail."""

    def __init__(self, batchable: bool) -> None:
        super().__init__()
        self.weight, self.batchable = nn.Parameter(torch.randn(3, 2, dtype=torch.float64)), batchable
        self.register_buffer("calls", torch.zeros(()))
        self.last: Any = None

    def forward(self, inputs: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        if not self.batchable:
            float(inputs.sum())
        self.last = inputs @ self.weight
        return self.last.tanh(), (self.last + offset).square()


def call(module: Scaled, n: int = 4) -> RepeatedCall:
    """Two rows belong to each example in the argument, one in the outputs' gradients."""
    torch.manual_seed(0)
    inputs, offset = torch.randn(2 * n, 3).double(), torch.ones(2).double()
    cotangents = (torch.randn(n, 2, 2).double(), torch.randn(2, n, 2).double())
    return RepeatedCall(
        module=_Reshaped(module),
        parameters={"w": module.weight.detach()},
        slots={"inner.weight": "w"},
        arguments=((inputs,), {"offset": offset}),
        dimensions=[0, None],
        cotangents=cotangents,
        places=[(0, 0), (1, 1)],
    )


class _Reshaped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.inner(inputs, offset)
        return first.reshape(-1, 2, 2), second.reshape(-1, 2, 2).transpose(0, 1)


@pytest.mark.parametrize("batchable", [True, False])
def test_equals_one_backward_pass_per_example(batchable: bool) -> None:
    module = Scaled(batchable)
    repeated = call(module)
    (inputs,), offset = repeated.arguments[0], repeated.arguments[1]["offset"]

    def loss(k: int) -> Tensor:
        first, second = repeated.module(inputs[2 * k : 2 * k + 2], offset)
        return (first[0] * repeated.cotangents[0][k]).sum() + (second[:, 0] * repeated.cotangents[1][:, k]).sum()

    truth = example_gradients({"w": module.weight}, loss, 4)
    module.last = None
    gradients, fingerprints = repeated.gradients()
    torch.testing.assert_close(gradients, truth)
    outputs = repeated.module(inputs, offset)
    expected = [fingerprint(output, d) for output, d in zip(outputs, (0, 1), strict=True)]
    torch.testing.assert_close(fingerprints, torch.stack(expected, dim=1))


@pytest.mark.parametrize("batchable", [True, False])
def test_the_module_is_left_as_it_was(batchable: bool) -> None:
    module = Scaled(batchable)
    weight = module.weight
    call(module).gradients()
    assert module.weight is weight
    assert weight.grad is None
    assert module.last is None


def test_errors_of_the_module_are_raised() -> None:
    class Broken(Scaled):
        def forward(self, inputs: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        call(Broken(True)).gradients()


def test_places_of_parameters() -> None:
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(2, 2, bias=False)})
    model["c"].weight = layer.weight
    assert [name for name, _ in parameter_slots(model)] == ["a.weight", "a.bias", "c.weight"]
    assert [name for name, _ in parameter_slots(layer)] == ["weight", "bias"]


def test_fingerprints_tell_tensors_apart() -> None:
    values = torch.randn(3, 4, 5)
    before = fingerprint(values, 0)
    assert before.shape == (3, 2)
    assert fingerprint(values.transpose(0, 1), 1).equal(before)
    assert same(before, fingerprint(values * (1 + 1e-6), 0), 1e-4)
    assert not same(before, fingerprint(values * 1.01, 0), 1e-4)
    assert not same(before, fingerprint(values.flip(0), 0), 1e-4)
    assert not same(before, fingerprint(-values, 0), 1e-4)


def test_fingerprints_of_masked_values() -> None:
    values = torch.tensor([[1.0, -torch.inf], [2.0, torch.nan], [0.0, 0.0]])
    before = fingerprint(values, 0)
    assert same(before, fingerprint(values.clone(), 0), 1e-4)
    assert not same(before, fingerprint(torch.nan_to_num(values), 0), 1e-4)
    assert same(fingerprint(torch.zeros(2, 3), 0), fingerprint(torch.zeros(2, 3), 0), 1e-4)
