from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_influence import RegressionLoss
from lightning_influence.capture import find_components, parameter_gradients
from lightning_influence.curvature import Diagonal
from tests import oracles
from tests.curvature.models import Mixed, Tokens, loss_of, mlp, normal, points, ready, texts, token_rows


@pytest.mark.parametrize("seed", [None, 2])
@pytest.mark.parametrize("damping", [None, 0.01])
@pytest.mark.parametrize(("build", "data"), [(Mixed, token_rows(7)), (Tokens, texts(6))])
def test_solving_divides_by_the_mean_square_of_whole_examples(
    build: Any, data: list[Any], damping: float | None, seed: int | None
) -> None:
    model = ready(build())
    fisher: Any = "empirical" if seed is None else "sampled"
    curvature = Diagonal(damping=damping, fisher=fisher, seed=seed or 0).fit(model, data, batch_size=3)
    parameters = dict(model.named_parameters())
    rows = oracles.example_gradients(parameters, lambda k: loss_of(model, data[k], k, seed), len(data))
    for component in curvature.components:
        gradients = normal(2, *component.shape)
        given = parameter_gradients(model, component, gradients)
        found = parameter_gradients(model, component, curvature.solve(component, gradients))
        squares = {name: rows[name].square().mean(0) for name in component.parameters}
        mean = float(torch.cat([square.flatten() for square in squares.values()]).mean())
        extra = 0.1 * mean if damping is None else damping
        for name in component.parameters:
            torch.testing.assert_close(found[name], given[name] / (squares[name] + extra))


def test_one_number_per_parameter() -> None:
    curvature = Diagonal().fit(mlp(), points())
    assert {key: tuple(value.shape) for key, value in curvature.state().items()} == {
        "0/diagonal.eigenvalues": (4, 4),
        "2/diagonal.eigenvalues": (3, 4),
    }


def test_labels_of_a_regression_can_be_sampled() -> None:
    model = mlp()
    data = list(zip(normal(8, 3), normal(8, 3, seed=1), strict=True))
    assert Diagonal().fit(model, data, RegressionLoss()).components == tuple(find_components(model))
