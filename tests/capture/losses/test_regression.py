from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_influence.capture import RegressionLoss
from lightning_influence.capture.sampling import Uniforms
from tests.capture.losses.cases import targets
from tests.capture.models import Mlp, points


@pytest.mark.parametrize("outputs", [(), (1,)])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_output_in_any_shape(outputs: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """[n] with [n, 1] broadcasts to [n, n], where the mean still looks like a loss."""
    model = Mlp(nn.Linear(3, 1), nn.Flatten(0 if outputs == () else 1))
    inputs, wanted = targets(*shape)(4)
    expected = 0.5 * (model(inputs).reshape(4) - wanted.reshape(4)).square()
    torch.testing.assert_close(RegressionLoss().losses(model, (inputs, wanted)), expected)
    torch.testing.assert_close(
        RegressionLoss().losses(model, {"inputs": inputs, "labels": wanted.float()}), expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_several_outputs(shape: tuple[int, ...]) -> None:
    size = torch.Size(shape).numel()
    model = Mlp(nn.Linear(3, size), nn.Unflatten(1, shape))
    inputs, wanted = targets(*shape)(4)
    expected = 0.5 * (model(inputs) - wanted).square().flatten(1).sum(1)
    torch.testing.assert_close(RegressionLoss().losses(model, (inputs, wanted)), expected)
    assert RegressionLoss().supervised((inputs, wanted)).tolist() == [1, 1, 1, 1]


def test_targets_are_drawn_around_the_predictions() -> None:
    n, model = 20_000, Mlp(nn.Linear(3, 2))
    batch = (points(1)[0].expand(n, -1), torch.zeros(n, 2).double())
    losses = RegressionLoss().sampled_losses(model, batch, Uniforms(torch.arange(n), 0))
    assert abs(losses.mean() - 1) < 4 / n**0.5  # half a chi-square with two degrees of freedom: mean 1, variance 1
    assert abs(losses.var() - 1) < 12 / n**0.5


@pytest.mark.parametrize(("outputs", "shape"), [((2,), ()), ((2,), (3,)), ((2, 3), (3, 2)), ((2,), (2, 2))], ids=str)
def test_other_shapes_are_refused(outputs: tuple[int, ...], shape: tuple[int, ...]) -> None:
    model = Mlp(nn.Linear(3, torch.Size(outputs).numel()), nn.Unflatten(1, outputs))
    message = r"RegressionLoss: got predictions \(4, .*\) for targets \(4.*\); expected the same shape"
    with pytest.raises(ValueError, match=message):
        RegressionLoss().losses(model, targets(*shape)(4))


def test_other_numbers_of_examples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got predictions \(4, 1\) for targets \(3,\)"):
        RegressionLoss().losses(Mlp(nn.Linear(3, 1)), (targets()(4)[0], targets()(3)[1]))
