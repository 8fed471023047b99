"""The rate of a component is that of the optimizer which holds its parameters, at the step that is meant."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_influence.callbacks.gradient_dot_recorder import GradientDotRecorder
from lightning_influence.callbacks.learning_rates import LearningRateWatch
from lightning_influence.capture.component import find_components
from lightning_influence.store import Store
from tests.callbacks.toys import Manual, Toy, data, every_step, run


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 5))


def rates_of(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: bool = True):
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.strategy.optimizers = list(optimizers)
    watch = LearningRateWatch()
    for optimizer in optimizers if steps else ():
        watch.note(optimizer)
        for group in optimizer.param_groups:  # as a scheduler does after the step
            group["lr"] *= 0.5
    return watch.of(trainer, model, find_components(model))


def test_groups_and_optimizers():
    model = net()
    first = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.4}, {"params": model[1].parameters()}], lr=0.2)
    second = torch.optim.AdamW(model[2].parameters(), lr=0.02)
    found = rates_of(model, first, second)
    assert found.next == {"0": 0.2, "1": 0.1, "2": 0.01}
    assert found.last == {"0": 0.4, "1": 0.2, "2": 0.02}
    assert not found.not_optimized
    assert not found.several


def test_what_no_optimizer_holds_does_not_move():
    model = net()
    found = rates_of(model, torch.optim.SGD(model[1].parameters(), lr=0.1), steps=False)
    assert found.next == {"0": 0.0, "1": 0.1, "2": 0.0}
    assert found.last is None
    assert found.not_optimized == ("0", "2")


def test_several_rates_within_a_component_are_weighted_by_size():
    model = net()
    weights, biases = [[p for p in model.parameters() if p.dim() == d] for d in (2, 1)]
    found = rates_of(model, torch.optim.SGD([{"params": weights}, {"params": biases, "lr": 0.3}], lr=0.1), steps=False)
    assert found.next["0"] == pytest.approx((0.1 * 12 + 0.3 * 3) / 15)
    assert found.several == dict.fromkeys("012", (0.1, 0.3))
    half = rates_of(model, torch.optim.SGD(weights, lr=0.1), steps=False)
    assert half.next["2"] == pytest.approx(0.1 * 10 / 15)
    assert half.not_optimized == ("0", "1", "2")
    assert half.several["2"] == (0.0, 0.1)


def test_a_rate_in_a_tensor_is_the_one_it_was():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.5), capturable=False, foreach=False)
    watch = LearningRateWatch()
    watch.note(optimizer)
    optimizer.param_groups[0]["lr"].mul_(0.5)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.strategy.optimizers = [optimizer]
    found = watch.of(trainer, model, find_components(model))
    assert found.next == dict.fromkeys("012", 0.25)
    assert found.last == dict.fromkeys("012", 0.5)
    watch.start()
    assert watch.of(trainer, model, find_components(model)).last is None


class Scheduled(Toy):
    """The rate falls to a tenth with every step; two groups, and the last layer is in none."""

    def configure_optimizers(self):
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[1].parameters(), "lr": 0.01}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


@pytest.mark.parametrize("candidates", [None, [[0, 1], [2, 3], [4, 5]]])
def test_every_recording_has_them(candidates, tmp_path):
    recorder = GradientDotRecorder(data(3, seed=9), candidates)
    run(tmp_path, [recorder, every_step(tmp_path, 2)], Scheduled, max_epochs=1)
    for record in recorder.records:
        rates = Store.open(record.path).read_json("learning_rates")
        assert rates["next"] == pytest.approx(
            {"net.0": 0.1 * 0.1**record.step, "net.1": 0.01 * 0.1**record.step, "net.4": 0}
        )
        assert rates["last"] == pytest.approx({k: 10 * v for k, v in rates["next"].items()})
        assert rates["not_optimized"] == ["net.4"]
        assert rates["several"] == {}


class Apart(Toy):
    def configure_optimizers(self):
        weights, biases = [[p for p in self.parameters() if (p.dim() == 2) == w] for w in (True, False)]
        return torch.optim.SGD([{"params": weights}, {"params": biases, "lr": 0.3}], lr=0.1)


def test_several_rates_are_told(tmp_path):
    recorder = GradientDotRecorder(data(3, seed=9), when="fit_end")
    with pytest.warns(UserWarning, match="parameters of 2 components have different learning rates, such as {'net.0'"):
        run(tmp_path, [recorder], Apart, max_epochs=1)


class Past(Manual):
    """Steps without Lightning."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


@pytest.mark.parametrize(("model", "last"), [(Manual, 0.1), (Past, None)])
def test_manual_optimization(model, last, tmp_path):
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")  # noqa: E731
    recorder = GradientDotRecorder(data(3, seed=9), when="fit_end", loss=loss)
    run(tmp_path, [recorder], model, max_epochs=1, enable_checkpointing=False)
    rates = Store.open(recorder.records[0].path).read_json("learning_rates")
    assert rates["next"]["net.0"] == 0.1
    assert rates["last"] is None if last is None else rates["last"]["net.0"] == last


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_does_not_know_the_last_step(tmp_path):
    run(tmp_path, [every_step(tmp_path, 4)], max_epochs=1)
    recorder = GradientDotRecorder(data(3, seed=9), when="both")
    recorder.load_state_dict({"version": 1, "roots": []})
    ckpt_path = str(next(tmp_path.glob("*.ckpt")))
    run(tmp_path, [recorder, every_step(tmp_path, 4)], max_epochs=2, ckpt_path=ckpt_path)
    rates = [Store.open(record.path).read_json("learning_rates")["last"] for record in recorder.records]
    assert [record.step for record in recorder.records] == [4, 8]
    assert rates[0] is None
    assert rates[1]["net.0"] == 0.1
