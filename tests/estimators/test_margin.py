from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_influence.capture import ClassificationLoss, LanguageModelLoss, RegressionLoss
from lightning_influence.capture.sampling import Uniforms
from lightning_influence.estimators.margin import ClassMargin, ModelOutput, TokenMargin, log_odds, output_for
from tests.curvature.models import Tokens, batch_of, mlp, normal, points, ready, texts


@given(seed=st.integers(0, 99), classes=st.integers(2, 6))
def test_log_odds_of_the_label(seed: int, classes: int) -> None:
    logits = normal(4, classes, seed=seed)
    labels = torch.arange(4) % classes
    p = logits.softmax(1)[range(4), labels]
    torch.testing.assert_close(log_odds(logits, labels), (p / (1 - p)).log())


def test_log_odds_of_what_is_all_but_certain() -> None:
    """1 - p is 0 in float32, and the derivative of the loss with it."""
    logits = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    [odds] = log_odds(logits, torch.tensor([0]))
    assert float(odds.detach()) == pytest.approx(60 - float(torch.tensor(2.0).log()))
    [gradient] = torch.autograd.grad(odds, logits)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -0.5, -0.5]]))


@pytest.mark.parametrize("last", [nn.Linear(4, 3), nn.Linear(4, 1)])
def test_of_classes(last: nn.Module) -> None:
    model = mlp(nn.Linear(3, 4), nn.Tanh(), last)
    rows = points(5, classes=2)
    x, y = torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows])
    y[3] = -100
    logits = model(x)
    chances = logits.softmax(1) if last.out_features == 3 else torch.stack([-logits[:, 0], logits[:, 0]], 1).sigmoid()
    p = chances[range(5), y.clamp_min(0)]
    kept = y != -100
    output = ClassMargin()
    assert isinstance(output, ModelOutput)
    torch.testing.assert_close(output.losses(model, (x, y)), (p / (1 - p)).log() * kept)
    torch.testing.assert_close(output.shortfall(model, (x, y)), (1 - p) * kept)
    assert output.supervised((x, y)).tolist() == kept.long().tolist()
    with pytest.raises(ValueError, match="log-odds are those of the data's own labels"):
        output.sampled_losses(model, (x, y), Uniforms(torch.arange(5), 0))


@pytest.mark.parametrize("labels", [torch.tensor([3, 0]), torch.tensor([-1, 0])])
def test_labels_out_of_range(labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"ClassMargin: got logits \(2, 3\) for labels .* from 0 to C - 1"):
        ClassMargin().losses(mlp(), (normal(2, 3), labels))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_of_tokens(reduction: Any) -> None:
    """Added up over the targets; what is lacking is a mean over them."""
    model = ready(Tokens())
    for row in texts(4):
        batch = batch_of(row)
        targets = row["labels"][1:]
        chances = model(batch["input_ids"], batch["attention_mask"])[0, :-1].softmax(1)
        p = chances[targets != -100, targets[targets != -100]]
        odds = (p / (1 - p)).log()
        output = TokenMargin(reduction)
        expected = odds.sum() if reduction == "sum" else odds.mean()
        torch.testing.assert_close(output.losses(model, batch)[0], expected)
        torch.testing.assert_close(output.shortfall(model, batch)[0], (1 - p).mean())


def test_a_sequence_without_a_target_lacks_nothing() -> None:
    batch = {key: torch.stack([row[key] for row in texts(3)]) for key in texts(1)[0]}
    batch["labels"][1] = -100
    for values in (TokenMargin().losses(ready(Tokens()), batch), TokenMargin().shortfall(ready(Tokens()), batch)):
        assert values[1] == 0
        assert (values[[0, 2]] != 0).all()


def test_the_output_of_a_loss() -> None:
    assert isinstance(output_for(ClassificationLoss()), ClassMargin)
    found = output_for(LanguageModelLoss("mean", shift=False))
    assert isinstance(found, TokenMargin)
    assert (found.reduction, found.shift) == ("mean", False)
    assert output_for(found) is found
    with pytest.raises(ValueError, match=r"`TRAK\(loss=RegressionLoss\)`: log-odds are known for classes and tokens"):
        output_for(RegressionLoss())
