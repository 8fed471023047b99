from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import EKFAC, KFAC, RegressionLoss
from tests import oracles
from tests.curvature.models import Images, Tokens, images, normal, ready, texts, truth


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize(
    ("build", "data", "layers"), [(Tokens, texts(), ["up", "head"]), (Images, images(), ["first", "second", "head"])]
)
def test_solving_is_the_formula(build: Any, data: list[Any], layers: list[str], fisher: Any) -> None:
    model = ready(build())
    curvature = KFAC(fisher=fisher).fit(model, data, components=layers, batch_size=3)
    for component in curvature.components:
        dense = truth(model, component.name, data, 0 if fisher == "sampled" else None)
        gradients = normal(2, *component.shape)
        expected = gradients.flatten(1) @ oracles.damped_inverse(oracles.kfac(dense.factors))
        torch.testing.assert_close(curvature.solve(component, gradients).flatten(1), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("member", [KFAC, EKFAC])
def test_exact_for_deep_linear_networks_with_squared_error(member: Any) -> None:
    """There S does not depend on the input (Bernacchia, Lengyel, Hennequin 2018): E[g gᵀ] = S ⊗ A, layer by layer.

    Every input stands in the data with every direction of the error, so that means are expectations.
    """
    model = ready(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 2)))
    inputs = normal(5, 3)
    errors = 2**0.5 * torch.cat([torch.eye(2), -torch.eye(2)]).double()
    with torch.no_grad():
        data = [(x, model(x) - error) for x in inputs for error in errors]
    curvature = member(damping=0.3, fisher="empirical").fit(model, data, RegressionLoss())
    for component in curvature.components:
        gradients = normal(3, *component.shape)
        rows = torch.stack([_gradient(model, component.name, x, y) for x, y in data])
        expected = gradients.flatten(1) @ oracles.damped_inverse(oracles.fisher(rows), 0.3)
        torch.testing.assert_close(curvature.solve(component, gradients).flatten(1), expected)


def _gradient(model: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    module = model.get_submodule(name)
    loss = 0.5 * (model(x) - y).square().sum()
    weight, *bias = torch.autograd.grad(loss, list(module.parameters()))
    return torch.cat([weight, *(b[:, None] for b in bias)], dim=1).flatten()


def test_one_pass_over_the_data() -> None:
    assert (KFAC.num_passes, EKFAC.num_passes) == (1, 2)
