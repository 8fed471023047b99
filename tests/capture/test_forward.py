from __future__ import annotations

import pytest
import torch
from lightning import LightningModule
from torch import nn

from lightning_influence.capture.forward import has_forward, runnable, runner


class Wrapper(LightningModule):
    """As many are: a network, a loss function and a metric, but no forward."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Called(Wrapper):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs


def patched() -> nn.Module:
    module = nn.Module()
    module.forward = lambda: None
    return module


@pytest.mark.parametrize(
    ("module", "answer"),
    [
        (nn.Linear(1, 1), True),
        (nn.Sequential(), True),
        (nn.ModuleList(), False),
        (nn.ModuleDict(), False),
        (nn.ParameterList(), False),
        (nn.Module(), False),
        (patched(), True),
        (Wrapper(), False),
        (Called(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_can_be_called(module: nn.Module, answer: bool) -> None:
    assert has_forward(module) is answer


def test_the_network_of_a_wrapper() -> None:
    network = nn.Linear(1, 1)
    assert runnable(network) is network
    assert runnable(Wrapper(model=network, loss=nn.CrossEntropyLoss(), rest=nn.ModuleList())) is network


@pytest.mark.parametrize(
    ("children", "found"),
    [({}, "none"), ({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}, r"\['a', 'b'\]"), ({"loss": nn.ReLU()}, "none")],
    ids=["no child", "two", "without parameters"],
)
def test_wrappers_of_no_or_several_networks(children: dict[str, nn.Module], found: str) -> None:
    message = rf"Wrapper has no forward\(\), and its children .* are {found}; expected exactly one. Define forward\(\)"
    with pytest.raises(ValueError, match=message):
        runnable(Wrapper(**children))


def test_who_uses_what_a_container_holds() -> None:
    model = nn.Sequential(nn.ModuleDict({"list": nn.ParameterList(), "layer": nn.Linear(1, 1)}))
    assert runner(model, "0.list") == runner(model, "0") == ""
    assert runner(model, "0.layer") == "0.layer"
