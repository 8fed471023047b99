from __future__ import annotations

import pytest
import torch

from lightning_influence.capture import ModuleLoss
from lightning_influence.capture.losses import HasExampleLosses
from lightning_influence.capture.sampling import Uniforms
from tests.capture.losses.cases import Own, own_batch
from tests.capture.models import Mlp, class_losses, points


def test_the_module_decides() -> None:
    model = Own()
    assert isinstance(model, HasExampleLosses)
    assert not isinstance(Mlp(), HasExampleLosses)
    torch.testing.assert_close(ModuleLoss().losses(model, own_batch(4)), class_losses(model, points(4)))
    assert ModuleLoss().reduction == "defined by the module"


def test_a_module_without_losses() -> None:
    with pytest.raises(ValueError, match=r"ModuleLoss: Mlp does not define example_losses\(batch\)"):
        ModuleLoss().losses(Mlp(), points(4))


def test_a_module_that_cannot_sample() -> None:
    class Silent(Mlp):
        example_losses = Own.example_losses

    message = r"Silent defines example_losses but not sampled_example_losses\(batch, uniforms\).*fisher='empirical'"
    with pytest.raises(ValueError, match=message):
        ModuleLoss().sampled_losses(Silent(), own_batch(4), Uniforms(torch.arange(4), 0))
