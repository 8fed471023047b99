from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_influence.store.fingerprint import model_fingerprint


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_what_does_not_matter(model):
    before = model_fingerprint(model)
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    twin[1].running_mean.fill_(3.0)
    twin[0].weight.data = twin[0].weight.data.t().contiguous().t()
    assert not twin[0].weight.is_contiguous()
    assert model_fingerprint(twin) == before
    assert len(before) == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[2].weight.data[0, 0].add_(1e-6),
        lambda model: model.double(),
        lambda model: model.bfloat16(),
        lambda model: model.append(nn.Linear(2, 2)),
        lambda model: setattr(model[0].weight, "data", model[0].weight.data.reshape(3, 4)),
    ],
    ids=["one value", "dtype", "half dtype", "one more layer", "shape"],
)
def test_what_matters(model, change):
    before = model_fingerprint(model)
    change(model)
    assert model_fingerprint(model) != before


def test_names_matter():
    layer = nn.Linear(2, 2)
    assert model_fingerprint(nn.ModuleDict({"a": layer})) != model_fingerprint(nn.ModuleDict({"b": layer}))


def test_the_order_of_modules_does_not_matter():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    one, other = nn.ModuleDict({"a": a, "b": b}), nn.ModuleDict({"b": b, "a": a})
    assert model_fingerprint(one) == model_fingerprint(other)


def test_tied_parameters_count_once():
    tied = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    tied[1].weight = tied[0].weight
    assert model_fingerprint(tied) == model_fingerprint(nn.Sequential(tied[0]))


def test_scalars_and_empty_parameters():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    model.nothing = nn.Parameter(torch.empty(0, 3))
    assert model_fingerprint(model) == model_fingerprint(copy.deepcopy(model))
