from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import LightningModule
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_influence.capture import (
    ClassificationLoss,
    ExampleLoss,
    FunctionLoss,
    LanguageModelLoss,
    ModuleLoss,
    RegressionLoss,
    resolve_loss,
)
from tests.capture import models
from tests.capture.losses.cases import CASES, LossCase
from tests.capture.models import Mlp, class_losses, points, text


class Wrapper(LightningModule):
    """What people write around a model of transformers: no forward of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config = {"lr": 1e-3}
        self.model = model

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.model(**batch).loss


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="aot_eager")


@pytest.mark.parametrize("case", [case for case in CASES if case.samples], ids=str)
def test_each_loss_is_found_for_its_batches(case: LossCase) -> None:
    model, batch = case.model(), case.batch(3)
    found = resolve_loss(model, batch)
    assert type(found) is type(case.loss)
    if case.name != "causal-mean":
        torch.testing.assert_close(found.losses(model, batch), case.loss.losses(model, batch))


@pytest.mark.parametrize(
    ("build", "shift", "encoder_decoder"),
    [
        (models.gpt2, True, False),
        (models.llama, True, False),
        (models.bert, False, False),
        (models.t5, False, True),
        (Mlp, True, False),
    ],
    ids=["gpt2", "llama", "bert", "t5", "unknown"],
)
@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper, compiled], ids=["itself", "wrapped", "compiled"])
def test_which_token_a_position_predicts(
    build: Callable[[], nn.Module], shift: bool, encoder_decoder: bool, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    loss = resolve_loss(wrap(build()), text())
    assert isinstance(loss, LanguageModelLoss)
    assert (loss.shift, loss.encoder_decoder) == (shift, encoder_decoder)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_adapted_models_count_as_what_they_adapt() -> None:
    for build, shift in ((models.gpt2, True), (models.bert, False), (models.t5, False)):
        model = get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear"))
        loss = resolve_loss(Wrapper(model), text())
        assert loss.shift is shift
        assert loss.losses(Wrapper(model), text()).shape == (3,)


def test_a_wrapped_network_is_called() -> None:
    for model in (models.gpt2(), models.bert(), models.t5()):
        loss = resolve_loss(model, text())
        torch.testing.assert_close(loss.losses(Wrapper(model), text()), loss.losses(model, text()))


def test_what_is_given_is_taken() -> None:
    loss = RegressionLoss()
    assert resolve_loss(Mlp(), points(), loss) is loss
    found = resolve_loss(Mlp(), object(), class_losses)
    assert isinstance(found, FunctionLoss)
    assert found.function is class_losses


def test_the_module_comes_before_the_batch() -> None:
    class Own(Mlp):
        def example_losses(self, batch: Any) -> torch.Tensor:
            return class_losses(self, batch)

    assert isinstance(resolve_loss(Own(), points()), ModuleLoss)


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        (torch.tensor([0.5, 1.0]), RegressionLoss),
        (torch.tensor([[0.0, 1.0], [1.0, 2.0]]), RegressionLoss),
        (torch.tensor([0, 1]), ClassificationLoss),
        (torch.tensor([True, False]), ClassificationLoss),
    ],
    ids=["numbers", "rows of numbers", "integers", "truth values"],
)
def test_pairs_by_their_labels(labels: torch.Tensor, loss: type[ExampleLoss]) -> None:
    assert type(resolve_loss(Mlp(), (torch.ones(2, 3), labels))) is loss


@pytest.mark.parametrize("labels", [torch.tensor([0.0, 1.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])])
def test_two_classes_or_a_regression(labels: torch.Tensor) -> None:
    message = r"all labels of the batch are 0. or 1., which could be two classes or a regression. Pass loss="
    with pytest.raises(ValueError, match=message):
        resolve_loss(Mlp(), (torch.ones(2, 3), labels))


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2),
        {"x": torch.ones(2)},
        (torch.ones(2),),
        (*points(), torch.ones(5)),
        (torch.ones(2, 3), torch.ones(2, 3).long()),
        3,
    ],
    ids=["tensor", "no labels", "one", "three", "rows of integers", "number"],
)
def test_unknown_batches(batch: Any) -> None:
    message = rf"loss=None: no per-example loss is known for a batch of type {type(batch).__name__}. Expected a mapping"
    with pytest.raises(ValueError, match=message):
        resolve_loss(Mlp(), batch)
    fallback = RegressionLoss()
    assert resolve_loss(Mlp(), batch, fallback=fallback) is fallback
    assert resolve_loss(Mlp(), points(), fallback=fallback) is not fallback


def test_a_loss_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss=3: expected an ExampleLoss, a function \(model, batch\) -> \[n\], or"):
        resolve_loss(Mlp(), points(3), 3)  # type: ignore[arg-type]
