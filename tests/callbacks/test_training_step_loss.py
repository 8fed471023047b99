"""What `training_step` returns, in whatever form and with whatever arguments, as losses of single examples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence.callbacks import CurvatureRecorder, GradientDotRecorder, pristine
from lightning_influence.callbacks.training_step_loss import TrainingStepLoss, training_step_loss
from lightning_influence.capture import ClassificationLoss, GradientCapture
from lightning_influence.curvature import EKFAC
from lightning_influence.errors import UnsupportedLayerError
from lightning_influence.estimators.scores import Scores
from lightning_influence.store import Store
from tests.callbacks.toys import Manual, Toy, assert_same, data, every_step, outcome, run, trainer

BATCH = data(4).tensors


class Logs(Toy):
    """Outside of the loop, `self.log` would raise."""

    def loss(self, batch: Any) -> torch.Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        self.seen.append(batch[0])
        return loss


class BatchOnly(Logs):
    def training_step(self, batch):
        return self.loss(batch)


class OtherNames(Logs):
    def training_step(self, data, k):
        assert k == 1
        return {"loss": self.loss(data), "more": 2}


class Third(Logs):
    def training_step(self, batch, batch_idx, dataloader_idx):
        assert (batch_idx, dataloader_idx) == (1, 0)
        return SimpleNamespace(loss=self.loss(batch))


class Default(Logs):
    def training_step(self, batch, batch_idx, dataloader_idx=7):
        assert dataloader_idx == 7
        return self.loss(batch)[None]


class Stars(Logs):
    def training_step(self, *arguments):
        assert len(arguments) == 2
        return self.loss(arguments[0])


@pytest.mark.parametrize("kind", [BatchOnly, OtherNames, Third, Default, Stars])
def test_every_form_of_a_training_step(kind):
    model = kind()
    with pristine(None, model):
        found = training_step_loss(model, BATCH)
        assert found.shape == ()
        torch.testing.assert_close(found, F.cross_entropy(model(BATCH[0]), BATCH[1]))
    assert model.seen == []


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_those_of_single_examples(reduction):
    class Reduced(Toy):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1], reduction=reduction)

    model = Reduced()
    loss = TrainingStepLoss(reduction)
    assert loss.reduction == f"defined by training_step, a {reduction} over examples"
    with pristine(None, model), GradientCapture(model) as capture:
        norms = sum(record.squared_norms() for record in capture.record(BATCH, loss.losses))
        for k, norm in enumerate(norms):
            value = F.cross_entropy(model(BATCH[0][k : k + 1]), BATCH[1][k : k + 1])
            expected = sum(g.square().sum() for g in torch.autograd.grad(value, list(model.parameters())))
            torch.testing.assert_close(norm, expected)


class Iterates(Toy):
    def training_step(self, dataloader_iter):
        return None


class ReturnsNothing(Toy):
    def training_step(self, batch, batch_idx):
        return None


class ReturnsMany(Toy):
    def training_step(self, batch, batch_idx):
        return {"loss": torch.ones(4)}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Iterates,
            r"no per-example loss is known for a batch of type tuple, and training_step fails .* dataloader_iter",
        ),
        (ReturnsNothing, "returned something of type NoneType; expected the loss as one number"),
        (ReturnsMany, r"returned something of shape \(4,\); expected the loss as one number"),
        (Manual, "training_step of Manual: expected a LightningModule with automatic optimization"),
        (lambda: nn.Linear(4, 3), "training_step of Linear: expected a LightningModule"),
    ],
)
def test_what_cannot_be_run(model, message):
    with pytest.raises(ValueError, match=message):
        TrainingStepLoss().losses(model(), BATCH)


def test_what_a_layer_refuses_stays_what_it_is():
    class Refuses(Toy):
        def training_step(self, batch, batch_idx):
            raise UnsupportedLayerError("no")

    with pytest.raises(UnsupportedLayerError):
        TrainingStepLoss().losses(Refuses(), BATCH)


# -- in a fit, with batches that no adapter knows


class Triples(LightningModule):
    """Regression with a batch of three tensors, dropout and BatchNorm; notes and logs what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 1))
        self.seen: list[torch.Tensor] = []

    def errors(self, batch: Any) -> torch.Tensor:
        x, offset, y = batch
        return (self.net(x).squeeze(1) + offset - y) ** 2

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch[0][:, 0].clone())
        loss = self.reduced(self.errors(batch), batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss}

    def reduced(self, errors: torch.Tensor, batch: Any) -> torch.Tensor:
        return errors.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Summed(Triples):
    def reduced(self, errors, batch):
        return errors.sum()


class Weighted(Triples):
    def reduced(self, errors, batch):
        weights = batch[1].abs()
        return (errors * weights).sum() / weights.sum()


class Coupled(Triples):
    def reduced(self, errors, batch):
        return errors.std()


def triples(n: int = 12, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 4, generator=generator), torch.randn(n, generator=generator)
    return TensorDataset(*rows, torch.randn(n, generator=generator))


def fit_triples(folder, model, callbacks):
    torch.manual_seed(3)
    running = trainer(folder, callbacks)
    running.fit(model, DataLoader(triples(), batch_size=4, shuffle=True))
    return outcome(model, running)


def gradients(model, dataset) -> torch.Tensor:
    rows = []
    for row in dataset:
        parts = torch.autograd.grad(model.errors([t[None] for t in row]).sum(), list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [Triples, Summed])
def test_recorded_without_an_adapter(kind, tmp_path):
    recorder = GradientDotRecorder(triples(3, seed=5), when="fit_end")
    torch.manual_seed(0)
    model = kind()
    fit_triples(tmp_path, model, [recorder])
    store = Store.open(recorder.records[0].path)
    scores = Scores.load(store)
    model.eval()
    expected = gradients(model, triples(3, seed=5)) @ gradients(model, triples()).T
    torch.testing.assert_close(scores.total(), expected, rtol=1e-4, atol=1e-4)
    trained = "sum" if kind is Summed else "mean over examples"
    assert store.settings["trained_reduction"] == trained
    assert scores.reduction == f"defined by training_step, a {trained.split()[0]} over examples"


def test_training_is_bit_identical(tmp_path):
    def one(folder, *recorders):
        torch.manual_seed(0)
        return fit_triples(tmp_path / folder, Triples(), [*recorders, every_step(tmp_path / folder, 2)])

    plain = one("a")
    dots = GradientDotRecorder(triples(3, seed=5))
    factors = CurvatureRecorder(EKFAC(damping=0.1, fisher="empirical"), "both", components=["net.0", "net.4"])
    assert_same(one("b", dots, factors), plain)
    assert len(dots.records) == len(factors.records) == 3


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Weighted, "the scale of an example's loss depends on its batch.*define example_losses"),
        (Coupled, "(alone fails|not the one it has alone)"),
    ],
)
def test_losses_that_do_not_add_up_are_refused_before_training(kind, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit_triples(tmp_path, kind(), [GradientDotRecorder(triples(3, seed=5))])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_labels_cannot_be_sampled(tmp_path):
    with pytest.raises(ValueError, match=r"loss=training_step: .* cannot sample labels\. Ask for fisher='empirical'"):
        fit_triples(tmp_path, Triples(), [CurvatureRecorder(EKFAC(fisher="sampled"))])


def test_examples_of_another_layout_are_refused_before_training(tmp_path):
    queries = DataLoader(TensorDataset(torch.ones(3, 4)), batch_size=3)
    message = "no per-example loss is known for a batch of type list, and training_step fails on it .ValueError"
    with pytest.raises(ValueError, match=message):
        fit_triples(tmp_path, Triples(), [GradientDotRecorder(queries)])


def test_the_other_losses_come_first(tmp_path):
    recorder = GradientDotRecorder(data(3, seed=9), when="fit_end")
    run(tmp_path, [recorder], max_epochs=1)
    assert isinstance(recorder.settled_loss, ClassificationLoss)
