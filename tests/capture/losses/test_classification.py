from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.capture import ClassificationLoss
from lightning_influence.capture.sampling import Uniforms
from tests.capture import models
from tests.capture.losses.cases import binary, classified_text
from tests.capture.models import Mlp, points


def test_equals_the_formula() -> None:
    model, (inputs, labels) = Mlp(), points(5)
    expected = -model(inputs).log_softmax(1)[torch.arange(5), labels]
    torch.testing.assert_close(ClassificationLoss().losses(model, (inputs, labels)), expected)
    torch.testing.assert_close(ClassificationLoss().losses(model, [inputs, labels.int()]), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool])
@pytest.mark.parametrize("shape", [(5,), (5, 1)])
@pytest.mark.parametrize("flat", [False, True])
def test_two_classes_by_one_logit(dtype: torch.dtype, shape: tuple[int, ...], flat: bool) -> None:
    model, (inputs, labels) = Mlp(nn.Linear(3, 1), *[nn.Flatten(0)] * flat), binary(5)
    logits = model(inputs).reshape(5)
    expected = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")
    batch = (inputs, labels.to(dtype).reshape(shape))
    torch.testing.assert_close(ClassificationLoss().losses(model, batch), expected)
    assert ClassificationLoss().sampled_losses(model, batch, Uniforms(torch.arange(5), 0)).shape == (5,)


def test_two_classes_by_one_logit_are_drawn_with_its_probability() -> None:
    n, model = 20_000, Mlp(nn.Linear(3, 1))
    inputs = points(1)[0].expand(n, -1)
    probability = model(inputs[:1]).sigmoid().item()
    losses = ClassificationLoss().sampled_losses(model, (inputs, torch.zeros(n).long()), Uniforms(torch.arange(n), 0))
    ones = torch.isclose(losses, -torch.tensor(probability).double().log())
    assert abs(ones.double().mean().item() - probability) < 3.3 * 0.5 / n**0.5


def test_equals_the_loss_of_transformers() -> None:
    model, batch = models.bert_classifier(), classified_text(3)
    torch.testing.assert_close(ClassificationLoss().losses(model, batch).mean(), model(**batch).loss)


def test_an_ignored_label_is_none() -> None:
    model, (inputs, labels) = Mlp(), points(5)
    labels[2] = -100
    loss = ClassificationLoss()
    assert loss.supervised((inputs, labels)).tolist() == [1, 1, 0, 1, 1]
    assert loss.losses(model, (inputs, labels))[2] == 0
    drawn = loss.sampled_losses(model, (inputs, labels), Uniforms(torch.arange(5), 0))
    assert drawn[2] == 0
    assert (drawn > 0).sum() == 4


def images(n: int) -> Tensor:
    return torch.zeros(n, 2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (4, torch.tensor([0, 4, -1]), r"expected labels 0 to 3, or -100 for none. Got \[-1, 0, 4\]"),
        (4, torch.tensor([0.0, 0.5, 1.0]), r"expected labels 0 to 3, or -100 for none. Got \[0.0, 0.5, 1.0\]"),
        (1, torch.tensor([0, 2, 1]), r"expected labels 0 to 1, or -100 for none. Got \[0, 1, 2\]"),
        (4, images(3), r"got logits \(3, 4\) for labels \(3, 2, 2\); expected \[n, C\] \(or \[n\] for two classes\)"),
        (4, torch.zeros(2).long(), r"got logits \(3, 4\) for labels \(2,\)"),
    ],
    ids=["out of range", "no classes", "two classes", "several labels", "other number"],
)
def test_wrong_labels(outputs: int, labels: Tensor, message: str) -> None:
    model, inputs = Mlp(nn.Linear(3, outputs)), points(3)[0]
    for losses in (
        lambda: ClassificationLoss().losses(model, (inputs, labels)),
        lambda: ClassificationLoss().sampled_losses(model, (inputs, labels), Uniforms(torch.arange(len(labels)), 0)),
    ):
        with pytest.raises(ValueError, match=f"ClassificationLoss: {message}"):
            losses()


@pytest.mark.parametrize("batch", [(torch.ones(1), torch.ones(1), torch.ones(1)), {"x": torch.ones(1)}, torch.ones(1)])
def test_wrong_batches(batch: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"got a batch of type {type(batch).__name__}; expected \(x, y\) or a mapping"
    ):
        ClassificationLoss().losses(Mlp(), batch)
