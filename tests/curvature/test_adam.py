"""The step on one example is the one that torch's own Adam takes."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_influence.capture import find_components, parameter_gradients
from lightning_influence.curvature.adam import AdamMoments, AdamState, check_optimizers, packed


class Net(nn.Module):
    """Layers whose gradients are kept in another form than their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)
        self.norm = nn.LayerNorm(3)
        self.turned = Conv1D(4, 3)
        self.head = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.turned(self.norm(self.conv(x).mT)).tanh().mean(1))


X = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def trained(optimizer: Any = torch.optim.Adam, steps: int = 3, backwards: bool = False, **settings: Any):
    torch.manual_seed(0)
    model = Net().double()
    parameters = list(model.parameters())[:: -1 if backwards else 1]
    found = optimizer(parameters, **{"lr": 0.01, **settings})
    for k in range(steps):
        found.zero_grad()
        model(X[k : k + 2]).square().sum().backward()
        found.step()
    found.zero_grad()
    return model, found


def gradients_of(model: nn.Module, k: int) -> dict[str, Tensor]:
    rows = torch.autograd.grad(model(X[k : k + 1]).square().sum(), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), rows, strict=True))


def directions(model: nn.Module, moments: AdamMoments, k: int, variant: Any) -> dict[str, Tensor]:
    """By parameter."""
    found: dict[str, Tensor] = {}
    gradients = gradients_of(model, k)
    for component in find_components(model):
        one = packed(model, component, {name: gradients[name] for name in component.parameters})
        step = moments.direction(component.name, one[None], variant)
        found |= {name: part[0] for name, part in parameter_gradients(model, component, step).items()}
    return found


@pytest.mark.parametrize("settings", [{}, {"betas": (0.7, 0.95), "eps": 1e-3}, {"optimizer": torch.optim.AdamW}])
def test_less_is_what_adam_does(settings: dict[str, Any]) -> None:
    """θ - η Γ, with the optimizer's state as it is: a copy of both takes the step on one example."""
    model, optimizer = trained(backwards=True, **{**settings, "weight_decay": 0})
    moments = AdamMoments.from_optimizers(model, find_components(model), optimizer)
    for k in range(3):
        found = directions(model, moments, k, "less")
        twin, stepping = copy.deepcopy((model, optimizer))
        twin(X[k : k + 1]).square().sum().backward()
        stepping.step()
        for (name, before), after in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(found[name], (before - after).detach() / 0.01, rtol=1e-9, atol=1e-10)


def test_less_repo_is_its_formula() -> None:
    model, optimizer = trained(betas=(0.7, 0.95), eps=1e-3)
    moments = AdamMoments.from_optimizers(model, find_components(model), optimizer)
    found = directions(model, moments, 0, "less_repo")
    for name, g in gradients_of(model, 0).items():
        state = optimizer.state[model.get_parameter(name)]
        avg = 0.9 * state["exp_avg"] + 0.1 * g
        avg_sq = 0.999 * state["exp_avg_sq"] + 0.001 * g**2
        torch.testing.assert_close(found[name], avg / torch.sqrt(avg_sq + 1e-8))


def test_moments_are_copies_with_their_state() -> None:
    model, optimizer = trained(betas=(0.7, 0.95))
    moments = AdamMoments.from_optimizers(model, find_components(model, "head"), [optimizer])
    assert moments.states == {"head": AdamState(3, 0.7, 0.95, 1e-8)}
    before = moments.first["head"].clone()
    optimizer.state[model.head.weight]["exp_avg"].zero_()
    assert torch.equal(moments.first["head"], before)


def test_coarse_moments_become_float32() -> None:
    model = nn.Linear(2, 2).bfloat16()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2).bfloat16()).sum().backward()
    optimizer.step()
    moments = AdamMoments.from_optimizers(model, find_components(model), optimizer)
    assert moments.first[""].dtype == torch.float32
    assert moments.direction("", torch.ones(1, 2, 3)).dtype == torch.float32


def test_fresh_moments_are_those_of_a_first_step() -> None:
    model, _ = trained(steps=0)
    g = torch.tensor([[[1.0, -2.0, 3.0, 4.0], [0.5, 1.0, -1.0, 2.0]]])
    moments = AdamMoments.fresh(model, find_components(model))
    torch.testing.assert_close(moments.direction("head", g), g.sign(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "steps", "message"),
    [
        (torch.optim.SGD, 1, "SGD has taken no step on it"),
        (
            lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
            1,
            "SGD keeps ['momentum_buffer'], not exp_avg, exp_avg_sq",
        ),
        (torch.optim.Adam, 0, "Adam has taken no step on it"),
        (lambda p, lr: torch.optim.Adam(p[:2], lr), 1, "norm: no optimizer holds it"),
    ],
)
def test_no_moments(optimizer: Any, steps: int, message: str) -> None:
    model, found = trained(optimizer, steps)
    with pytest.raises(ValueError, match=re.escape(message)):
        AdamMoments.from_optimizers(model, find_components(model), found)


def test_parameters_of_a_component_must_be_treated_alike() -> None:
    model, _ = trained(steps=0)
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == wide]} for wide in (True, False)]
    groups[1]["betas"] = (0.5, 0.9)
    optimizer = torch.optim.Adam(groups)
    model(X).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="conv: its parameters differ in steps, betas or eps"):
        AdamMoments.from_optimizers(model, find_components(model), optimizer)
    second = torch.optim.Adam(model.head.parameters())
    with pytest.raises(ValueError, match="head: several optimizers hold it"):
        AdamMoments.from_optimizers(model, find_components(model, "head"), [optimizer, second])


def test_optimizers_are_checked_before_the_first_step() -> None:
    model, adam = trained(steps=0)
    components = find_components(model)
    check_optimizers(model, components, [adam])
    check_optimizers(model, components, [torch.optim.AdamW(model.parameters())])
    for wrong, message in (
        (torch.optim.SGD(model.parameters(), 0.1), "conv: SGD keeps no moments of Adam"),
        (torch.optim.Adamax(model.parameters()), "conv: Adamax keeps no moments of Adam"),
        (torch.optim.Adam(model.conv.parameters()), "norm: no optimizer holds it"),
    ):
        with pytest.raises(ValueError, match=message):
            check_optimizers(model, components, [wrong])


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (torch.optim.NAdam, {}, "NAdam"),
        (torch.optim.RAdam, {}, "RAdam"),
        (torch.optim.AdamW, {"amsgrad": True}, r"AdamW\(amsgrad=True\)"),
    ],
)
def test_who_steps_otherwise_than_adam_is_warned_of(kind: Any, options: dict[str, Any], named: str) -> None:
    model, _ = trained(steps=0)
    with pytest.warns(UserWarning, match=f"{named} keeps moments as Adam does and steps otherwise"):
        check_optimizers(model, find_components(model), [kind(model.parameters(), **options)])


def test_packing_is_the_inverse_of_taking_apart() -> None:
    model, _ = trained(steps=0)
    for component in find_components(model):
        g = torch.randn(1, *component.shape, dtype=torch.float64)
        parts = {name: part[0] for name, part in parameter_gradients(model, component, g).items()}
        assert torch.equal(packed(model, component, parts), g[0])


def test_unknown_variant() -> None:
    model, optimizer = trained()
    moments = AdamMoments.from_optimizers(model, find_components(model), optimizer)
    with pytest.raises(ValueError, match=r"variant='adam'\)`: expected 'less', with bias correction"):
        moments.direction("head", torch.zeros(1, 2, 4), "adam")
