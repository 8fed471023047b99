"""An extra pass leaves no trace: at every hook, whatever the model keeps, also when the pass fails."""

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
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

from lightning_influence.callbacks.guard import no_autocast, pristine
from tests.callbacks.toys import Toy, assert_same, data, every_step, fit, loader, trainer

HOOKS = [
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_end",
    "on_save_checkpoint",
    "on_before_optimizer_step",
    "on_train_end",
]


class ExtraPass(Callback):
    """Everything an extra pass may do: train-like steps on other data, with whatever noise they make."""

    def __init__(self, *hooks: str) -> None:
        self.calls = 0
        for hook in hooks:
            setattr(self, hook, self.run)

    def run(self, trainer: Any, module: Toy, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        self.calls += 1
        with pristine(trainer, module):
            extra_pass(module)


def draw() -> list[Any]:
    return [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()]  # noqa: NPY002


def extra_pass(module: Toy) -> None:
    draw()
    module.train()
    for batch in loader(8, seed=9, shuffle=True):
        seen = len(module.seen)
        module.training_step(batch, 0).backward()
        del module.seen[seen:]
        module.log_dict({"train_loss": torch.tensor(100.0)})
    module.net[0].weight.requires_grad_(False)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_bit_identical_at_every_hook(accumulate, tmp_path):
    settings = {"accumulate_grad_batches": accumulate}
    plain = fit([every_step(tmp_path / "a", 2)], tmp_path, **settings)
    extra = ExtraPass(*HOOKS)
    assert_same(fit([extra, every_step(tmp_path / "b", 2)], tmp_path, **settings), plain)
    assert extra.calls > len(HOOKS)


def test_the_pass_itself_would_show(tmp_path):
    """Without the guard the same pass changes the training: the test above can fail."""

    class Unguarded(ExtraPass):
        def run(self, trainer, module, *_):
            F.cross_entropy(module(data().tensors[0]), data().tensors[1]).backward()

    plain = fit([], tmp_path, enable_checkpointing=False)
    with pytest.raises(AssertionError):
        assert_same(fit([Unguarded("on_train_batch_start")], tmp_path, enable_checkpointing=False), plain)


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
    with pristine(None, model):
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
    with pristine(None, model):
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
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), pristine(None, model):
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


def test_gradients_are_there_inside_trainer_validate(tmp_path):
    """The evaluation loop runs under inference_mode, in which nothing can be differentiated."""

    class Gradients(Callback):
        norm = None

        def on_validation_end(self, trainer, module):
            with pristine(trainer, module):
                x, y = data().tensors
                F.cross_entropy(module(x), y).backward()
                self.norm = module.net[0].weight.grad.norm()

    gradients = Gradients()
    trainer(tmp_path, [gradients]).validate(Toy(), loader(8), verbose=False)
    assert gradients.norm > 0


def test_nested_modules_are_muted_too_and_get_their_log_back():
    class Outer(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Toy()

    model = Outer()
    seen: list[Any] = []
    model.inner.log = lambda *args: seen.append(args)
    with pristine(None, model):
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
    with pristine(None, model):
        handle = model._orig_mod[0].register_forward_hook(lambda *_: fired.append(1))
        model(torch.ones(1, 2))
        handle.remove()
    assert fired == [1]


def test_a_compiled_model_is_refused_where_it_cannot_run_eagerly(monkeypatch):
    model = torch.compile(nn.Linear(2, 2), backend="eager")
    monkeypatch.delattr(torch.compiler, "set_stance")
    with pytest.raises(RuntimeError, match=r"compiled: expected torch >= 2\.6"), pristine(None, model):
        pass
    with pristine(None, nn.Linear(2, 2)):
        pass


def test_autocast_is_left_alone_where_there_is_none():
    with no_autocast("meta"):
        assert not torch.is_autocast_enabled("cpu")
