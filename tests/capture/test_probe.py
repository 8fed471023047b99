"""Every row of the table: what a batch's loss may be, and what the probe says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.capture import ClassificationLoss, FunctionLoss, GradientCapture, LanguageModelLoss
from lightning_influence.capture.losses import BatchLoss, ExampleLoss
from lightning_influence.capture.probe import LossProbe, probe_loss
from tests.capture import models
from tests.capture.models import Mlp, class_losses, points, text


class Whole(BatchLoss):
    """A function of the batch."""

    def __init__(self, function: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.function = function

    def batch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.function(model, batch)


class Tokens(Whole):
    """Knows how many targets the examples have."""

    def supervised(self, batch: Any) -> Tensor:
        return (batch["labels"][:, 1:] != -100).sum(1)


def probe(model: nn.Module, batch: Any, loss: ExampleLoss) -> LossProbe:
    with GradientCapture(model) as capture:
        return probe_loss(capture, batch, loss)


def normed() -> Mlp:
    return Mlp(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))


def mean(model: nn.Module, batch: Any) -> Tensor:
    return class_losses(model, batch).mean()


def with_decay(model: nn.Module, batch: Any) -> Tensor:
    return mean(model, batch) + 0.1 * sum(p.square().sum() for p in model.parameters())


def summed(model: nn.Module, batch: Any) -> Tensor:
    return class_losses(model, batch).sum()


def weighted(model: nn.Module, batch: Any) -> Tensor:
    weight = torch.tensor([1.0, 5.0, 1.0, 2.0], dtype=torch.float64)
    return F.cross_entropy(model(batch[0]), batch[1], weight=weight)


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


def token_mean(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch, use_cache=False).loss


@pytest.mark.parametrize(
    ("model", "function", "kind"),
    [
        (Mlp, mean, "same"),
        (normed, mean, "same"),
        (Mlp, with_decay, "same"),
        (Mlp, summed, "times n"),
        (Mlp, lambda model, batch: mean(model, batch) / len(batch[0]), "over n"),
        (Mlp, weighted, "scaled"),
        (Mlp, contrastive, "coupled"),
    ],
    ids=["mean", "BatchNorm", "decay", "sum", "divided", "weighted", "contrastive"],
)
def test_losses_of_batches(model: Callable[[], nn.Module], function: Any, kind: str) -> None:
    found = probe(model(), points(), Whole(function))
    assert found.kind == kind, found
    if kind == "same":
        assert found.ratios == pytest.approx((1.0, 1.0))
        assert found.cosines == pytest.approx((1.0, 1.0))
    if kind == "times n":
        assert found.ratios == pytest.approx((5.0, 5.0))
    if kind == "scaled":
        assert found.ratios[0] != pytest.approx(found.ratios[1], rel=0.1)


def test_mean_over_tokens() -> None:
    ragged = probe(models.gpt2(), text(), Tokens(token_mean))
    counts = Tokens(token_mean).supervised(text()).double()
    assert ragged.kind == "scaled"
    assert ragged.ratios == pytest.approx(tuple((torch.stack([counts.min(), counts.max()]) / counts.mean()).tolist()))
    assert probe(models.gpt2(), text(padding=False), Tokens(token_mean)).kind == "same"


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (class_losses, "same"),
        (lambda model, batch: class_losses(model, batch) / len(batch[0]), "over n"),
        (lambda model, batch: class_losses(model, batch) * len(batch[0]), "times n"),
        (lambda model, batch: class_losses(model, batch) / (0.1 + batch[0].square().sum()), "scaled"),
        (
            lambda model, batch: F.cross_entropy(model(batch[0] - batch[0].mean(0)), batch[1], reduction="none"),
            "coupled",
        ),
        (lambda model, batch: F.cross_entropy(model(batch[0]).squeeze(), batch[1], reduction="none"), "fails alone"),
    ],
    ids=["apart", "divided", "multiplied", "scaled", "centred", "squeezed"],
)
def test_losses_of_examples(function: Any, kind: str) -> None:
    assert probe(Mlp(), points(), FunctionLoss(function)).kind == kind


@pytest.mark.parametrize("loss", [LanguageModelLoss(), LanguageModelLoss("mean")])
@pytest.mark.parametrize("model", [models.gpt2, models.llama])
def test_language_models(model: Callable[[], nn.Module], loss: ExampleLoss) -> None:
    assert probe(model(), text(), loss).kind == "same"


def test_half_precision_is_close_enough() -> None:
    batch = (points(8)[0].bfloat16(), points(8)[1])
    assert probe(Mlp().bfloat16(), batch, ClassificationLoss()).kind == "same"


def test_examples_without_a_target_are_not_looked_at() -> None:
    inputs, labels = points()
    labels = torch.cat([torch.tensor([-100]), labels[1:4], torch.tensor([-100])])
    found = probe(Mlp(), (inputs, labels), ClassificationLoss())
    assert found.kind == "same"
    assert len(found.ratios) == 2
    labels[:2] = labels[3:] = -100
    assert probe(Mlp(), (inputs, labels), ClassificationLoss()).ratios == pytest.approx((1.0,))


def test_nothing_can_be_said() -> None:
    loss = FunctionLoss(lambda model, batch: class_losses(model, batch[:2]))
    assert "one example only" in str(probe(Mlp(), points(1), loss))
    uncut = probe(Mlp(), (*points(), torch.ones(3)), loss)
    assert uncut.kind == "unknown"
    assert str(uncut) == (
        "examples cannot be compared alone and in a batch (the batch cannot be cut into examples: it holds an array of "
        "shape (3,), and 5 examples)"
    )
    silent = FunctionLoss(lambda model, batch: class_losses(model, batch) * (torch.arange(len(batch[0])) == 2))
    assert "no gradient" in str(probe(Mlp(), points(), silent))


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (LossProbe("same"), "same gradient alone"),
        (LossProbe("times n"), "multiplied by"),
        (LossProbe("over n"), "divided by"),
        (LossProbe("scaled", (0.5, 1.5), (1.0, 1.0)), r"is 0\.5, 1\.5 times .* class-weighted mean"),
        (LossProbe("coupled", (2.0,), (0.1,)), r"cosines 0\.1, ratios 2\): examples are compared"),
        (LossProbe("fails alone", reason="ValueError: one"), r"alone fails \(ValueError: one\)"),
    ],
)
def test_what_is_said(found: LossProbe, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        raise ValueError(str(found))
