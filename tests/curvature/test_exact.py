from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence.capture import find_components, parameter_gradients
from lightning_influence.curvature import Exact
from lightning_influence.errors import StoreError
from tests import oracles
from tests.curvature.models import Mixed, loss_of, mlp, normal, points, ready, token_rows


def joint_fisher(model: nn.Module, data: list[Any], seed: int | None) -> tuple[list[str], Tensor]:
    """Names of the parameters in the order of the matrix, and E[g gᵀ] over all of them."""
    parameters = dict(model.named_parameters())
    rows = oracles.example_gradients(parameters, lambda k: loss_of(model, data[k], k, seed), len(data))
    return list(parameters), oracles.fisher(torch.cat([rows[name].flatten(1) for name in parameters], dim=1))


def by_parameter(model: nn.Module, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for component in find_components(model):
        found |= parameter_gradients(model, component, gradients[component.name])
    return found


@pytest.mark.parametrize("seed", [None, 2])
@pytest.mark.parametrize("damping", [None, 0.01])
def test_preconditioning_inverts_the_whole_fisher(seed: int | None, damping: float | None) -> None:
    model, data = ready(Mixed()), token_rows(9)
    fisher: Any = "empirical" if seed is None else "sampled"
    curvature = Exact(damping=damping, fisher=fisher, seed=seed or 0).fit(model, data, batch_size=4)
    names, matrix = joint_fisher(model, data, seed)
    gradients = {c.name: normal(2, *c.shape, seed=k) for k, c in enumerate(curvature.components)}
    found = by_parameter(model, curvature.precondition(gradients))
    rows = torch.cat([by_parameter(model, gradients)[name].flatten(1) for name in names], dim=1)
    expected = rows @ oracles.damped_inverse(matrix, damping)
    torch.testing.assert_close(torch.cat([found[name].flatten(1) for name in names], dim=1), expected)


def test_solving_one_component_holds_the_others_fixed() -> None:
    model, data = mlp(), points(20)
    curvature = Exact(damping=0.05, fisher="empirical").fit(model, data)
    names, matrix = joint_fisher(model, data, None)
    assert names == ["0.weight", "0.bias", "2.weight"]
    component = curvature.components[1]
    gradients = normal(3, *component.shape)
    expected = gradients.flatten(1) @ oracles.damped_inverse(matrix[16:, 16:], 0.05)
    torch.testing.assert_close(curvature.solve(component, gradients).flatten(1), expected)


def test_float32_gradients_stay_float32() -> None:
    model = mlp().float()
    curvature = Exact().fit(model, [(x.float(), y) for x, y in points()])
    gradients = {c.name: normal(2, *c.shape).float() for c in curvature.components}
    assert {g.dtype for g in curvature.precondition(gradients).values()} == {torch.float32}
    assert curvature.eigenvalues.dtype == torch.float64


def test_too_large_a_model_is_refused_before_the_data_is_read() -> None:
    class Unread(list):
        def __getitem__(self, position: int) -> Any:
            assert position < 32, "read beyond the first batch"
            return super().__getitem__(position)

    model = nn.Sequential(nn.Linear(3, 5001), nn.Linear(5001, 3))
    data = Unread((x.float(), y) for x, y in points(40))
    with pytest.raises(ValueError, match=r"`Exact\(\)`: 35,010 parameters need a matrix of 10 GB; expected at most"):
        Exact().fit(model, data)


def test_a_state_of_another_model_is_refused() -> None:
    state = Exact().fit(mlp(), points()).state()
    with pytest.raises(StoreError, match=r"Exact.load_state: 28 eigenvalues for 16 parameters"):
        Exact().load_state(find_components(mlp())[:1], state)
