from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.capture.losses.token_cross_entropy import token_cross_entropy
from lightning_influence.curvature.differentiation import (
    cut_off,
    differentiated,
    has_dead_end,
    signature,
    tracked_ones,
)
from tests.curvature.models import DeadEnd, Tokens, labels, mlp, normal, ready


def test_dead_ends_are_found_where_autograd_says_nothing() -> None:
    def slope(function: Any, weights: Tensor) -> list[Tensor]:
        logits = normal(4, 3).requires_grad_()
        return list(torch.autograd.grad(function(logits * 2), logits, weights, create_graph=True))

    once = lambda z: DeadEnd.apply(z).sum(1)  # noqa: E731
    fast = lambda z: token_cross_entropy(z, labels(4, 3))  # noqa: E731
    weights = tracked_ones(normal(4))
    assert weights.tolist() == [1.0] * 4
    assert has_dead_end(slope(once, weights))
    assert not has_dead_end(slope(fast, weights))
    assert not has_dead_end(slope(once, torch.ones(4).double()))  # why the weights are tracked
    assert not has_dead_end([normal(2)])


def test_only_the_named_parameters_are_differentiated() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    with differentiated(model, ["0.weight", "2.weight"]) as chosen:
        assert chosen[0] is model[0].weight
        assert [p.requires_grad for p in model.parameters()] == [True, False, True]
        assert not model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True]


def test_outputs_are_cut_off_in_place_of_the_logits() -> None:
    logits = normal(2, 3).requires_grad_() * 1
    for output in (logits, (logits, 1), {"logits": logits, "other": None}, SimpleNamespace(logits=logits, other=1)):
        found, leaf, changed = cut_off(output)
        assert found is logits
        assert leaf.is_leaf
        assert leaf.requires_grad
        assert type(changed) is type(output)
        inner = {tuple: lambda o: o[0], dict: lambda o: o["logits"], SimpleNamespace: lambda o: o.logits}
        assert inner.get(type(output), lambda o: o)(changed) is leaf
        assert inner.get(type(output), lambda o: o)(output) is logits  # the model's own object is left alone


def test_a_signature_tells_any_change() -> None:
    model = ready(Tokens())
    names = [name for name, _ in signature(model)]
    assert names == [name for name, _ in model.named_parameters()]
    before = dict(signature(model))
    with torch.no_grad():
        model.up.weight.mul_(-1)  # keeps the norm
    changed = [name for name, value in signature(model) if not torch.equal(value, before[name])]
    assert changed == ["up.weight"]
