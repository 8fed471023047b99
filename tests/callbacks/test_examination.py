"""What one batch tells: whether examples have losses of their own, and what the user makes of them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_influence.callbacks import CurvatureRecorder, GradientDotRecorder
from lightning_influence.callbacks.examination import Examination, examine, resolve
from lightning_influence.callbacks.guard import pristine
from lightning_influence.callbacks.recording import Recording
from lightning_influence.callbacks.training_step_loss import TrainingStepLoss
from lightning_influence.capture import (
    ClassificationLoss,
    ExampleLoader,
    FunctionLoss,
    LanguageModelLoss,
    RegressionLoss,
)
from lightning_influence.store import Store
from tests.callbacks.toys import Manual, Toy, data, run, trainer

X, Y = data(6).tensors


def look(folder: Path, model: Any, loss: Any = None, rows: Any = None, **settings: Any) -> Examination:
    recording = Recording(trainer(folder, **settings), model, 0, "checkpoint", None, folder, "norms")
    examples = rows if isinstance(rows, ExampleLoader) else ExampleLoader(data(6) if rows is None else rows, 6)
    with pristine(None, model):
        return examine(recording, examples, resolve(recording, examples, loss))


class Steps(Toy):
    """Trained on what the test says."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.step = step

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)


@pytest.mark.parametrize(
    ("step", "verdict"),
    [
        (F.mse_loss, "mean squared error (0.6667 x mean over examples)"),
        (lambda x, y: 3 * F.mse_loss(x, y), "none of these"),
        (lambda x, y: 1.5 * F.mse_loss(x, y), "mean over examples"),
        (lambda x, y: 0 * F.mse_loss(x, y), "none of these"),
    ],
    ids=["mse", "three times", "half squares", "nothing"],
)
def test_the_mean_squared_error_is_known_by_its_factor(step, verdict, tmp_path):
    """The loss recorded is half the squared error, summed over the 3 outputs: a constant factor, no other loss."""
    rows = TensorDataset(X, F.one_hot(Y, 3).to(X.dtype) + 0.25)
    other = pytest.warns(UserWarning, match="influence is that on") if verdict[:4] == "none" else nullcontext()
    with other:
        found = look(tmp_path, Steps(lambda model, batch: step(model(batch[0]), batch[1])), rows=rows)
    assert isinstance(found.loss, RegressionLoss)
    assert found.trained_reduction.startswith(verdict)


def entropy(**settings: Any) -> Any:
    return lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], **settings)


@pytest.mark.parametrize(
    ("step", "verdict"),
    [
        (entropy(), "mean over examples"),
        (entropy(reduction="sum"), "sum"),
        (lambda model, batch: entropy()(model, batch) * 2, "none of these (mean over examples / training_step = 0.5)"),
        (entropy(label_smoothing=0.3), "none of these (mean over examples / training_step = "),
        (lambda model, batch: entropy()(model, batch) * 0, "none of these (mean over examples / training_step = inf)"),
        (lambda model, batch: model.missing, "not compared: AttributeError: "),
        (lambda model, batch: model.trainer.world_size, "not compared: RuntimeError: "),
    ],
    ids=["mean", "sum", "twice", "smoothing", "nothing", "attribute", "trainer"],
)
def test_what_training_makes_of_the_losses(step, verdict, tmp_path):
    other = pytest.warns(UserWarning, match="norms: for the same batch training_step returns .* influence is that on")
    with other if verdict.startswith("none") else nullcontext():
        found = look(tmp_path, Steps(step))
    assert found.trained_reduction.startswith(verdict)
    assert isinstance(found.loss, ClassificationLoss)


def test_a_step_that_optimises_itself_is_not_run(tmp_path):
    found = look(tmp_path, Manual(), ClassificationLoss())
    assert found.trained_reduction.startswith("not compared: ValueError: training_step of Manual: expected")


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_both_are_taken_in_the_precision_of_the_training(precision, tmp_path):
    model = Toy().double() if precision == "64-true" else Toy()
    rows = TensorDataset(X.double(), Y) if precision == "64-true" else None
    assert look(tmp_path, model, rows=rows, precision=precision).trained_reduction == "mean over examples"


class Words(LightningModule):
    """A mean over the tokens that are not masked."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))

    def forward(self, input_ids: Any) -> Any:
        return self.net(input_ids)

    def training_step(self, batch, batch_idx):
        logits = self(batch["input_ids"])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


class Sentences:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(9, (6,), generator=torch.Generator().manual_seed(k))
        return {"input_ids": tokens, "labels": torch.where(torch.arange(6) < 3 + k, tokens, -100)}


@pytest.mark.parametrize("loss", [None, LanguageModelLoss("mean")])
def test_a_mean_over_tokens(loss, tmp_path):
    assert look(tmp_path, Words(), loss, Sentences()).trained_reduction == "mean over tokens"


# -- examples alone and in a batch


def test_the_order_in_which_losses_are_found(tmp_path):
    class Own(Steps):
        def example_losses(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    given = FunctionLoss(lambda model, batch: model.example_losses(batch))
    assert look(tmp_path, Own(entropy()), given).loss is given
    assert look(tmp_path, Own(entropy())).loss.reduction == "defined by the module"
    three = TensorDataset(X, Y, torch.arange(6))
    assert isinstance(look(tmp_path, Steps(entropy()), rows=three).loss, TrainingStepLoss)
    assert isinstance(look(tmp_path, Steps(entropy()), RegressionLossOfLogits(), rows=three).loss, RegressionLoss)


class RegressionLossOfLogits(RegressionLoss):
    """With the cross-entropy as its losses, so that both agree."""

    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_a_sum_is_noticed(tmp_path):
    three = TensorDataset(X, Y, torch.arange(6))
    found = look(tmp_path, Steps(entropy(reduction="sum")), rows=three)
    assert isinstance(found.loss, TrainingStepLoss)
    assert (found.loss.batch_reduction, found.trained_reduction) == ("sum", "sum")
    assert look(tmp_path, Steps(entropy(reduction="sum")), found.loss).loss is found.loss
    with pytest.raises(ValueError, match="the loss of an example is divided by the number of examples"):
        look(tmp_path, Steps(entropy()), TrainingStepLoss("sum"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda model, batch: losses(model, batch) / len(batch[0]), "divided by the number of examples"),
        (lambda model, batch: losses(model, (batch[0] - batch[0].mean(0), batch[1])), "not the one it has alone"),
    ],
)
def test_losses_that_depend_on_the_batch_are_refused(function, message, tmp_path):
    with pytest.raises(ValueError, match=rf"norms, loss defined by a function: .*{message}.*define example_losses"):
        look(tmp_path, Toy(), function)


def losses(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_what_cannot_be_probed_is_said(tmp_path):
    def squeezed(model, batch):
        return F.cross_entropy(model(batch[0]).squeeze(), batch[1], reduction="none")

    with pytest.warns(
        UserWarning, match="the loss of one example alone fails .* so it is taken on trust that the loss"
    ):
        look(tmp_path, Toy(), squeezed)

    def with_shared(rows):
        return (*torch.utils.data.default_collate(rows), torch.ones(2))

    shared = ExampleLoader(data(6), 6, with_shared)
    with pytest.warns(UserWarning, match="cannot be cut into examples: it holds an array"):
        look(tmp_path, Toy(), losses, shared)
    with pytest.warns(UserWarning, match="the batch holds one example only"):
        look(tmp_path, Toy(), rows=ExampleLoader(data(6), 2, indices=[3]))
    assert isinstance(look(tmp_path, Toy(), rows=ExampleLoader(data(6), 1)).loss, ClassificationLoss)


def test_a_training_step_that_fails_on_one_example_is_refused(tmp_path):
    def step(model, batch):
        return F.cross_entropy(model(batch[0]).squeeze(), batch[1])

    with pytest.raises(ValueError, match="the loss of one example alone fails"):
        look(tmp_path, Steps(step), rows=TensorDataset(X, Y, torch.arange(6)))


@pytest.mark.parametrize(
    "recorder",
    [
        lambda: CurvatureRecorder(components="net.0"),
        lambda: GradientDotRecorder(data(3, seed=9), components="net.0", when="fit_end"),
    ],
)
def test_the_verdict_is_in_the_store(recorder, tmp_path):
    recorder = recorder()
    assert recorder.trained_reduction == "not compared"
    run(tmp_path, [recorder], max_epochs=1)
    assert Store.open(recorder.records[0].path).settings["trained_reduction"] == "mean over examples"
