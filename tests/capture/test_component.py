from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_influence.capture.component import (
    Component,
    Coverage,
    Use,
    check_components,
    coverage_of,
    find_components,
    packing,
    parameter_gradients,
)
from lightning_influence.capture.layers import FallbackRule, LinearRule
from lightning_influence.errors import UnsupportedLayerError
from tests.capture import models
from tests.capture.models import Mlp
from tests.cases import Prefixed
from tests.curvature.models import Mixed


def test_components_follow_the_modules() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 4), nn.Conv1d(2, 3, 2), nn.PReLU())
    found = [(c.name, c.kind, c.shape, c.parameters) for c in find_components(model)]
    assert found == [
        ("0", "embedding", (5, 3), ("0.weight",)),
        ("1", "norm", (2, 3), ("1.weight", "1.bias")),
        ("2", "linear", (4, 4), ("2.weight", "2.bias")),
        ("3", "conv", (3, 5), ("3.weight", "3.bias")),
        ("4", "other", (1,), ("4.weight",)),
    ]
    assert [c.numel for c in find_components(model)] == [15, 6, 16, 15, 1]


def test_the_model_itself_can_be_a_component() -> None:
    [component] = find_components(nn.Linear(3, 4))
    assert component == Component("", "linear", (Use("", ("weight", "bias")),), ("weight", "bias"), (4, 4))


def test_layers_that_share_everything_are_one_component() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight, model["b"].bias = model["a"].weight, model["a"].bias
    [component] = find_components(model)
    assert component.uses == (Use("a", ("weight", "bias")), Use("b", ("weight", "bias")))
    assert component.shape == (3, 4)


def test_names_are_unique_when_parameters_are_shared_with_different_modules() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["b"].weight, model["c"].bias = model["a"].weight, model["a"].bias
    assert {c.name: [u.module for u in c.uses] for c in find_components(model)} == {
        "a.weight": ["a", "b"],
        "a.bias": ["a", "c"],
        "b": ["b"],
        "c": ["c"],
    }


def test_modules_that_arrange_a_shared_parameter_differently_keep_it_flat() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"table": nn.Embedding(3, 3), "head": Conv1D(3, 3)})
    model["head"].weight = model["table"].weight
    shared, bias = find_components(model)
    assert (shared.kind, shared.shape, len(shared.uses)) == ("other", (9,), 2)
    assert (bias.name, bias.kind, bias.shape) == ("head", "linear", (3, 1))
    assert isinstance(packing(model, shared.uses), FallbackRule)
    assert isinstance(packing(model, bias.uses), LinearRule)


def test_gradients_are_taken_apart_by_parameter() -> None:
    model = models.bert()
    for component in find_components(model):
        parts = parameter_gradients(model, component, torch.randn(2, *component.shape))
        assert tuple(parts) == component.parameters
        assert all(g.shape == (2, *model.get_parameter(name).shape) for name, g in parts.items())


def test_nothing_left() -> None:
    message = r"find_components\(select=None\): Linear has no component left.*name frozen layers explicitly"
    with pytest.raises(UnsupportedLayerError, match=message):
        find_components(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(UnsupportedLayerError, match="ReLU has no component left"):
        find_components(nn.ReLU())
    with pytest.raises(UnsupportedLayerError, match="has no component left"):
        find_components(Mlp(), lambda name, module: False)


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.ones(3, dtype=torch.cfloat))
        self.head = nn.Linear(3, 4)


def test_complex_parameters_are_left_out() -> None:
    model = Spectral()
    components = find_components(model)
    assert [c.name for c in components] == ["head"]
    assert coverage_of(model, components) == Coverage(16, 19, ("filter",))


def test_coverage_counts_tied_parameters_once() -> None:
    model = models.gpt2()
    total = sum(p.numel() for p in model.parameters())
    assert coverage_of(model, find_components(model)) == Coverage(total, total, ())
    assert str(coverage_of(model, find_components(model, "all-linear"))).startswith(
        "1,680 of 2,040 trainable parameters"
    )


def test_coverage_in_words() -> None:
    model = Prefixed()
    assert str(coverage_of(model, find_components(model))) == "37 of 37 trainable parameters covered"
    half = coverage_of(model, find_components(model, "inner"))
    assert str(half) == (
        "12 of 37 trainable parameters covered; left out (67.6 %): token, positions, scales.0, scales.1"
    )
    assert str(Coverage(0, 9, tuple("abcdefghi"))).endswith("left out (100 %): a, b, c, d, e, f, g, h and 1 more")


def test_components_of_another_model_are_refused() -> None:
    components = find_components(Mlp())
    check_components(Mlp(), components)
    with pytest.raises(ValueError, match=r"1 of 2 components are not those of this Mlp: layers\.2: has another shape"):
        check_components(Mlp(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)), components)
    with pytest.raises(ValueError, match=r"2 of 2 components are not those of this Linear: layers\.0: .*no attribute"):
        check_components(nn.Linear(2, 2), components)


@pytest.mark.parametrize("build", [models.gpt2, models.llama, models.bert, models.t5, Mixed])
def test_names_of_components_select_them(build: Callable[[], nn.Module]) -> None:
    """Also of those that are one of several in their module, or are tied."""
    model = build()
    components = find_components(model)
    assert find_components(model, [c.name for c in components]) == components
    for component in components:
        assert find_components(model, component.name) == [component]


def test_a_name_is_not_taken_for_the_beginning_of_others() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    assert [c.name for c in find_components(model, ["1"])] == ["1"]
    assert [c.name for c in find_components(model, "^1")] == ["1", "10", "11"]


def test_the_nearest_names_are_told() -> None:
    with pytest.raises(ValueError, match=r"the nearest are \['model\.layers\.0\.self_attn\.q_proj'"):
        find_components(models.llama(), "model.layers.0.self_attn.q_porj")
