"""A pass leaves no trace, whatever the model keeps, also when the pass fails."""

from __future__ import annotations

import random
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch import seed_everything
from torch import nn
from torch.nn import functional as F

from lightning_influence.capture.guard import no_autocast, unchanged
from tests.callbacks.toys import Toy, assert_same, data


def draw() -> list[Any]:
    return [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()]  # noqa: NPY002


class Kept(nn.Module):
    """One of everything that a guard has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.frozen = nn.Dropout().eval()
        self.register_buffer("nan", torch.tensor(float("nan")))
        self.mean = torchmetrics.MeanMetric()
        self.values = torchmetrics.CatMetric()
        collection = [torchmetrics.classification.BinaryPrecision(), torchmetrics.classification.BinaryRecall()]
        self.pair = torchmetrics.MetricCollection(collection)
        self.device = torch.device("cpu")

    def touch(self) -> None:
        draw()
        self.norm(self.linear(torch.randn(4, 2))).sum().backward()
        self.norm.running_mean = torch.ones(2)
        self.nan += 1
        self.mean.update(3.0)
        self.values.update(torch.ones(2))
        self.pair.update(torch.rand(4), torch.tensor([0, 1, 1, 0]))
        self.pair.compute()
        self.linear.requires_grad_(False)
        self.linear.weight.grad = None


def touch(model: Kept, fails: bool) -> None:
    with unchanged(model):
        model.touch()
        assert not fails or 1 / 0


def state(model: Kept) -> dict[str, Any]:
    return {
        "buffers": {k: v.nan_to_num(7.0).clone() for k, v in model.named_buffers()},
        "identity": [id(t) for t in (*model.buffers(), *model.parameters())],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "mean": model.mean.mean_value.clone(),
        "values": list(model.values.value),
        "updates": [m.update_count for m in (model.mean, model.values, *model.pair.values())],
        "groups": deepcopy(model.pair.compute_groups),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_everything_a_module_keeps_is_put_back(fails):
    model = Kept().train()
    model.frozen.eval()
    model.linear.weight.grad = torch.full((2, 2), 5.0)
    model.mean.update(1.0)
    model.values.update(torch.zeros(1))
    before = state(model)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        touch(model, fails)
    assert_same(state(model), before)
    assert model.linear.weight.grad.tolist() == [[5.0, 5.0], [5.0, 5.0]]
    assert float(model.mean.compute()) == 1.0
    assert model.values.compute().tolist() == 0.0
    model.pair.update(torch.tensor([0.9, 0.2]), torch.tensor([1, 1]))
    assert model.pair.compute() == {"BinaryPrecision": 1.0, "BinaryRecall": 0.5}


def test_states_shared_by_a_metric_collection_stay_shared():
    model = Kept()
    for _ in range(2):
        model.pair.update(torch.tensor([0.9, 0.2]), torch.tensor([1, 1]))
    expected = model.pair.compute()
    with unchanged(model):
        model.pair.update(torch.rand(5), torch.ones(5, dtype=torch.long))
    model.pair.update(torch.tensor([0.9, 0.2]), torch.tensor([1, 1]))
    assert model.pair.compute() == expected


@pytest.mark.parametrize("fails", [False, True])
def test_random_states_are_put_back(fails):
    model = Kept()
    seed_everything(3, verbose=False)
    expected = draw()
    seed_everything(3, verbose=False)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        touch(model, fails)
    assert draw() == expected


def test_what_holds_inside():
    model = Toy()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), unchanged(model):
        assert not any(m.training for m in model.modules())
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
        loss = F.cross_entropy(model(data().tensors[0]), data().tensors[1])
        assert loss.dtype == torch.float32
        loss.backward()
        assert model.net[0].weight.grad is not None
    assert model.net[0].weight.grad is None
    assert model.training


def test_nested_modules_are_muted_too_and_get_their_log_back():
    class Outer(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Toy()

    model = Outer()
    seen: list[Any] = []
    model.inner.log = lambda *args: seen.append(args)
    with unchanged(model):
        model.log("loss", 1.0)
        model.inner.log("loss", 1.0)
        model.inner.log_dict({"loss": 1.0})
    assert seen == []
    model.inner.log("loss", 2.0)
    assert seen == [("loss", 2.0)]
    assert "log" not in model.__dict__
    assert "log_dict" not in model.inner.__dict__


def test_a_warm_compiled_model_runs_its_hooks():
    model = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="eager")
    model(torch.ones(1, 2))
    fired: list[int] = []
    with unchanged(model):
        handle = model._orig_mod[0].register_forward_hook(lambda *_: fired.append(1))
        model(torch.ones(1, 2))
        handle.remove()
    assert fired == [1]


def test_a_compiled_model_is_refused_where_it_cannot_run_eagerly(monkeypatch):
    model = torch.compile(nn.Linear(2, 2), backend="eager")
    monkeypatch.delattr(torch.compiler, "set_stance")
    with pytest.raises(RuntimeError, match=r"compiled: expected torch >= 2\.6"), unchanged(model):
        pass
    with unchanged(nn.Linear(2, 2)):
        pass


def test_autocast_is_left_alone_where_there_is_none():
    with no_autocast("meta"):
        assert not torch.is_autocast_enabled("cpu")
