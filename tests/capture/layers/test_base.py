"""The laws that hold for every layer rule."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_influence.capture import Component, GradientCapture, LayerRecord, parameter_gradients
from lightning_influence.capture.layers import RULES, LayerCall, LayerRule, rule_for
from lightning_influence.capture.layers.base import is_plain, per_example, widened
from tests.cases import CASES, LayerCase, only
from tests.oracles import example_gradients

SIZES = (1, 4, 5)  # also n = t, where a wrong dimension goes unnoticed

every_case = pytest.mark.parametrize("case", CASES, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def captured(model: nn.Module, case: LayerCase, n: int) -> list[tuple[Component, LayerRecord]]:
    with GradientCapture(model) as capture:
        return list(zip(capture.components, capture.record(case.batch(n), case.losses, n=n), strict=True))


def by_parameter(model: nn.Module, records: list[tuple[Component, LayerRecord]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for component, record in records:
        found |= parameter_gradients(model, component, record.example_gradients())
    return found


def test_no_rule_is_missing() -> None:
    assert {type(rule_for(case.build())) for case in CASES} == {type(rule) for rule in RULES}
    assert {type(rule) for rule in RULES} == set(LayerRule.__subclasses__())


@pytest.mark.parametrize("n", SIZES)
@every_case
def test_equals_one_backward_pass_per_example(case: LayerCase, n: int) -> None:
    model, batch = case.model(), case.batch(n)
    found = by_parameter(model, captured(model, case, n))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == set(trainable)
    truth = example_gradients(trainable, lambda k: case.losses(model, case.alone(batch, k)).sum(), n)
    for name, gradients in truth.items():
        torch.testing.assert_close(found[name], gradients, rtol=case.tolerance, atol=case.tolerance)


@every_case
def test_adds_up_to_the_gradient_of_the_batch(case: LayerCase) -> None:
    model = case.model()
    found = by_parameter(model, captured(model, case, 4))
    case.losses(model, case.batch(4)).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not getattr(model.layer, "scale_grad_by_freq", False):
            torch.testing.assert_close(found[name].sum(0), parameter.grad, rtol=case.tolerance, atol=case.tolerance)


@every_case
def test_components_say_what_the_records_are(case: LayerCase) -> None:
    model = case.model()
    records = captured(model, case, 3)
    assert case.kind in {component.kind for component, _ in records}
    assert sum(component.numel for component, _ in records) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    for component, record in records:
        assert record.example_gradients().shape == (3, *component.shape)
        assert record.example_numel == component.numel
        assert record.ids.tolist() == [0, 1, 2]
        assert len(record) == 3


@every_case
def test_frozen_layers_can_be_asked_for(case: LayerCase) -> None:
    model, batch = case.model().requires_grad_(False), case.batch(3)
    with GradientCapture(model, lambda name, module: True) as capture:
        records = list(zip(capture.components, capture.record(batch, case.losses, n=3), strict=True))
    found, parameters = by_parameter(model, records), dict(model.named_parameters())
    assert not any(parameter.requires_grad for parameter in parameters.values())
    truth = example_gradients(parameters, lambda k: case.losses(model, case.alone(batch, k)).sum(), 3)
    for name, gradients in truth.items():
        torch.testing.assert_close(found[name], gradients, rtol=case.tolerance, atol=case.tolerance)


@every_case
def test_products_equal_those_of_the_gradients(case: LayerCase) -> None:
    model = case.model()
    for (component, left), (_, right) in zip(captured(model, case, 4), captured(model, case, 3), strict=True):
        a, b = left.example_gradients().flatten(1), right.example_gradients().flatten(1)
        torch.testing.assert_close(left.dot_products(right), a @ b.mT, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(left.squared_norms(), a.square().sum(1), rtol=1e-10, atol=1e-10)
        for q in (1, 3):
            given = torch.randn(q, *component.shape, dtype=a.dtype)
            torch.testing.assert_close(left.contract(given), given.flatten(1) @ a.mT, rtol=1e-10, atol=1e-10)


@every_case
def test_the_model_is_left_as_it_was(case: LayerCase) -> None:
    model = case.model()
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    attributes = {module: set(vars(module)) for module in model.modules()}
    losses = case.losses(model, case.batch(3)).detach()
    captured(model, case, 3)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    assert {module: set(vars(module)) for module in model.modules()} == attributes
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(case.losses(model, case.batch(3)).detach(), losses, rtol=0, atol=0)


class Half(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


def patched() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("module", "plain"),
    [
        (nn.Linear(2, 2), True),
        (only(nn.Linear(2, 2), "bias"), True),
        (type("Named", (nn.Linear,), {})(2, 2), True),
        (Half(2, 2), False),
        (patched(), False),
        (parametrizations.weight_norm(nn.Linear(2, 2)), False),
        (nn.Conv1d(2, 2, 1), False),
    ],
    ids=["itself", "partly frozen", "only renamed", "another forward", "patched", "parametrised", "another type"],
)
def test_a_formula_holds_for_plain_modules_only(module: nn.Module, plain: bool) -> None:
    assert is_plain(module, (nn.Linear,)) == plain


def test_the_input_of_a_call_is_its_first_tensor() -> None:
    x = torch.ones(1, 2)
    assert LayerCall((None, x), {"other": torch.zeros(1)}, ()).input is x
    assert LayerCall((), {"input": x}, ()).input is x


def test_shared_inputs_and_narrow_numbers() -> None:
    assert per_example(torch.ones(1, 2), 3).shape == per_example(torch.ones(3, 2), 3).shape == (3, 2)
    assert widened(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert widened(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
