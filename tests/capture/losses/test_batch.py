from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence.capture import GradientCapture
from lightning_influence.capture.losses import BatchLoss
from lightning_influence.capture.losses.batch import is_shared
from lightning_influence.capture.sampling import Uniforms
from tests.capture.models import Mlp, class_losses, points


class Reduced(BatchLoss):
    """The cross-entropy of a batch, reduced as the test says."""

    def batch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        losses = class_losses(model, batch)
        return losses.mean() if self.batch_reduction == "mean" else losses.sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_those_of_single_examples(reduction: Any) -> None:
    model, batch = Mlp(), points()
    loss = Reduced(reduction)
    assert loss.reduction == f"defined by batch loss, a {reduction} over examples"
    torch.testing.assert_close(loss.losses(model, batch).sum(), class_losses(model, batch).sum())
    with GradientCapture(model) as capture:
        found = [record.example_gradients() for record in capture.record(batch, loss.losses)]
    with GradientCapture(model) as capture:
        expected = [record.example_gradients() for record in capture.record(batch, class_losses)]
    torch.testing.assert_close(found, expected)


def test_half_precision_losses_stay_shared() -> None:
    model, batch = Mlp(nn.Linear(3, 4)).bfloat16(), points()
    losses = Reduced().losses(model, (batch[0].bfloat16(), batch[1]))
    assert losses.dtype == torch.float32
    assert is_shared(losses)
    assert not is_shared(class_losses(Mlp(), batch))
    assert not is_shared(Reduced().losses(Mlp(), points(1)))


def test_labels_cannot_be_sampled() -> None:
    message = r"loss=batch loss: the loss of a batch cannot sample labels\. Ask for fisher='empirical'"
    with pytest.raises(ValueError, match=message):
        Reduced().sampled_losses(Mlp(), points(), Uniforms(torch.arange(5), 0))


def test_another_reduction() -> None:
    with pytest.raises(ValueError, match=r"`Reduced\(batch_reduction='max'\)`: expected 'mean' or 'sum'"):
        Reduced("max")  # type: ignore[arg-type]
