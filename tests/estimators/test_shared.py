from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_influence.capture import Component, find_components
from lightning_influence.estimators.shared import distance, is_head, is_inner, match_components
from tests.curvature.models import Mixed, mlp


def linear(name: str, shape: tuple[int, ...] = (2, 3), kind: str = "linear") -> Component:
    return Component(name, kind, (), (f"{name}.weight",), shape)


def names(pairs: list[tuple[Component, Component]]) -> list[tuple[str, str]]:
    return [(one.name, other.name) for one, other in pairs]


LAYERS = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]


@pytest.mark.parametrize(
    ("before", "after"), [("", ""), ("model.", ""), ("", "net."), ("model.", "backbone."), ("a.b.", "c.d.e.")]
)
def test_names_may_differ_by_a_prefix(before: str, after: str) -> None:
    left, right = [linear(before + name) for name in LAYERS], [linear(after + name) for name in reversed(LAYERS)]
    assert names(match_components(left, right)) == [(before + name, after + name) for name in LAYERS]


def test_prefixes_are_those_of_most_components() -> None:
    """A head of the same shape elsewhere does not decide."""
    left = [linear("model.up"), linear("model.down"), linear("head.up")]
    right = [linear("backbone.up"), linear("backbone.down"), linear("other.up")]
    assert names(match_components(left, right)) == [("model.up", "backbone.up"), ("model.down", "backbone.down")]


def test_what_differs_in_shape_or_kind_is_not_shared() -> None:
    left = [linear("up"), linear("down"), linear("norm", kind="norm")]
    right = [linear("up"), linear("down", (4, 3)), linear("norm")]
    assert names(match_components(left, right)) == [("up", "up")]
    assert match_components(left[:1], right[1:]) == []
    assert match_components([linear("model.up")], [linear("model.down")]) == []
    assert match_components([linear("modelling.up")], [linear("up")]) != []  # a prefix is whole parts


def test_counterparts_by_name() -> None:
    left, right = [linear("a"), linear("b"), linear("c", (4, 4))], [linear("x"), linear("y"), linear("z", (4, 4))]
    expected = [("a", "y"), ("c", "z")]
    assert names(match_components(left, right, {"c": "z", "a": "y"})) == expected
    assert names(match_components(left, right, lambda name: {"a": "y", "c": "z"}.get(name))) == expected


@pytest.mark.parametrize(
    ("match", "text"),
    [
        ({"q": "x"}, "'q' is no component of the pre-trained model"),
        ({"a": "q"}, "'q' is no component of the fine-tuned model"),
        ({"a": "z"}, r"'a' \(2, 3\) is not alike 'z' \(4, 4\)"),
        ({"a": "x", "b": "x"}, "two components have the same counterpart"),
        (lambda name: "q", "'q' is no component of the fine-tuned model"),
    ],
)
def test_counterparts_that_are_none(match: object, text: str) -> None:
    left, right = [linear("a"), linear("b")], [linear("x"), linear("z", (4, 4))]
    with pytest.raises(ValueError, match=text):
        match_components(left, right, match)


class Transformer(nn.Module):
    """As transformers marks the layer that makes the outputs."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.up = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.to_words = nn.Linear(3, 5, bias=False)
        if tied:
            self.to_words.weight = self.embedding.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.to_words


@pytest.mark.parametrize("tied", [False, True])
def test_heads_and_norms_are_not_inner(tied: bool) -> None:
    model = Transformer(tied)
    inner = [c.name for c in find_components(model) if is_inner(model, c)]
    assert inner == (["up"] if tied else ["embedding", "up"])
    mixed = Mixed()
    assert [c.name for c in find_components(mixed) if is_head(mixed, c)] == ["head"]


def test_distance() -> None:
    model, other = mlp(), mlp()
    [component, _] = find_components(model)
    with torch.no_grad():
        other[0].weight[1, 2] += 3
        other[0].bias[0] -= 4
    moved, norm = distance((model, component), (other, component))
    assert moved == pytest.approx(5)
    assert norm == pytest.approx(float(torch.cat([p.flatten() for p in model[0].parameters()]).detach().norm()))
