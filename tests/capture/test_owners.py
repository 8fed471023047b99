from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lightning_influence.capture.owners import PRESETS, owners_of, taken
from tests.capture import models
from tests.capture.models import Mlp


def selected(model: nn.Module, select: object) -> list[str]:
    wanted = taken(owners_of(model), select)
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]


class Containers(nn.Module):
    """Parameters in containers that are never called, and a module that claims its child's."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(2)])
        self.nested = nn.ModuleDict({"inner": nn.ParameterDict({"a": torch.ones(2)}), "layer": nn.Linear(2, 2)})
        self.attention = nn.MultiheadAttention(2, 1)
        self.alias = self.scales[0]

    def forward(self) -> None: ...


def test_containers_belong_to_the_module_that_is_called() -> None:
    owners = {owner.name: (owner.labels, list(owner.parameters)) for owner in owners_of(Containers())}
    assert owners == {
        "": (["", "scales", "nested", "nested.inner"], ["alias", "nested.inner.a"]),
        "nested.layer": (["nested.layer"], ["weight", "bias"]),
        "attention": (["attention"], ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]),
    }


def test_a_claiming_model_owns_everything() -> None:
    [owner] = owners_of(nn.MultiheadAttention(2, 1))
    assert owner.name == ""
    assert len(owner.parameters) == 4


def test_a_module_under_two_names_counts_once() -> None:
    layer = nn.Linear(2, 2)
    assert [owner.name for owner in owners_of(nn.Sequential(layer, layer))] == ["0"]


def test_everything_trainable_by_default() -> None:
    model = Mlp()
    model.layers[0].weight.requires_grad_(False)
    assert selected(model, None) == ["layers.0.bias", "layers.2.weight", "layers.2.bias"]


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("layers.2", {"layers.2.weight", "layers.2.bias"}),
        (r"\.2$", {"layers.2.weight", "layers.2.bias"}),
        (["layers.0", "layers.2"], {"layers.0.bias", "layers.2.weight", "layers.2.bias"}),
        (("layers.0",), {"layers.0.bias"}),
        ("all-linear", {"layers.0.bias", "layers.2.weight", "layers.2.bias"}),
        (
            lambda name, module: isinstance(module, nn.Linear) and module.out_features == 4,
            {"layers.2.weight", "layers.2.bias"},
        ),
    ],
    ids=["name", "expression", "list", "tuple", "preset", "callable"],
)
def test_ways_to_select(select: object, names: set[str]) -> None:
    model = Mlp()
    model.layers[0].weight.requires_grad_(False)  # of a partly trainable layer the trainable part
    assert set(selected(model, select)) == names


def test_a_frozen_layer_that_is_named_is_taken_wholly() -> None:
    model = Mlp().requires_grad_(False)
    assert selected(model, None) == []
    assert selected(model, "layers.0") == ["layers.0.weight", "layers.0.bias"]


@pytest.mark.parametrize(
    ("preset", "build", "modules"),
    [
        (
            "all-linear",
            models.llama,
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        ("mlp", models.llama, {"gate_proj", "up_proj", "down_proj"}),
        ("attention", models.llama, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("embedding", models.llama, {"embed_tokens"}),
        ("all-linear", models.gpt2, {"c_attn", "c_proj", "c_fc"}),
        ("mlp", models.gpt2, {"c_proj", "c_fc"}),
        ("attention", models.gpt2, {"c_attn", "c_proj"}),
        ("embedding", models.gpt2, {"wte", "wpe"}),
        ("embedding", lambda: models.gpt2(tie_word_embeddings=False), {"wte", "wpe"}),
        ("all-linear", lambda: models.gpt2(tie_word_embeddings=False), {"c_attn", "c_proj", "c_fc", "lm_head"}),
        ("attention", models.bert, {"query", "key", "value", "dense", "LayerNorm"}),
    ],
)
def test_presets(preset: str, build: object, modules: set[str]) -> None:
    names = selected(build(), preset)
    assert {name.split(".")[-2] for name in names} == modules


@pytest.mark.parametrize("select", ["*lora*", "layers.[0-3", ["layers.0", "*lora*"]])
def test_what_is_no_regular_expression(select: object) -> None:
    want = select if isinstance(select, str) else "*lora*"
    with pytest.raises(
        ValueError, match=rf"select={re.escape(repr(want))}\): this is no regular expression \(.* position"
    ):
        selected(Mlp(), select)


@pytest.mark.parametrize("select", ["nothing", ["layers.0", "nothing"], "lora"])
def test_a_name_that_matches_nothing(select: object) -> None:
    want = "lora" if select == "lora" else "nothing"
    message = (
        rf"find_components\(select='{want}'\): no module with parameters matches.*{re.escape(str(sorted(PRESETS)))}"
    )
    with pytest.raises(ValueError, match=message):
        selected(Mlp(), select)
