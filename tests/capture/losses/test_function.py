from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_influence.capture import FunctionLoss
from lightning_influence.capture.sampling import Uniforms
from tests.capture.models import Mlp, class_losses, points


def test_the_function_decides() -> None:
    model = Mlp()
    assert torch.equal(FunctionLoss(class_losses).losses(model, points(4)), class_losses(model, points(4)))
    assert FunctionLoss(class_losses).reduction == "defined by a function"


@pytest.mark.parametrize(("function", "name"), [(class_losses, "class_losses"), (partial(class_losses), "function")])
def test_a_function_cannot_sample(function: object, name: str) -> None:
    message = rf"loss={name}: a function of \(model, batch\) cannot sample labels. Ask for fisher='empirical'"
    with pytest.raises(ValueError, match=message):
        FunctionLoss(function).sampled_losses(Mlp(), points(4), Uniforms(torch.arange(4), 0))
