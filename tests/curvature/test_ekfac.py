"""EK-FAC against its formula, from a model and rows of data to solved gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import EKFAC, InfluenceFunction
from lightning_influence.capture import parameter_gradients
from tests import oracles
from tests.curvature.models import (
    Images,
    Mixed,
    Tokens,
    images,
    loss_of,
    mlp,
    normal,
    points,
    ready,
    texts,
    token_rows,
    truth,
)


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    data: Callable[..., list[Any]]
    layers: tuple[str, ...]


def sequences(n: int = 9, seed: int = 0) -> list[Any]:
    """(x [t, i], class): linear layers over positions."""
    return [(normal(5, 3, seed=seed + 7 * k), y) for k, (_, y) in enumerate(points(n, seed))]


class Pooled(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(3, 4, bias=bias), nn.Linear(4, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x).tanh()).square().mean(1)


CASES = {
    "linear": Case(mlp, points, ("0", "2")),
    "linear, one example": Case(mlp, lambda n=1, seed=0: points(n, seed), ("0", "2")),
    "linear over positions": Case(lambda: Pooled(True), sequences, ("up", "head")),
    "linear over positions, no bias": Case(lambda: Pooled(False), sequences, ("up", "head")),
    "padded and masked text": Case(Tokens, texts, ("up", "head")),
    "padded and masked text, no bias": Case(lambda: Tokens(False), texts, ("up", "head")),
    "convolutions": Case(Images, images, ("first", "second", "head")),
}


@pytest.mark.filterwarnings("ignore:EKFAC. too few positions")
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("name", CASES)
def test_solving_is_the_formula(name: str, fisher: Any) -> None:
    case, seed = CASES[name], 3
    model, data = ready(case.build()), case.data()
    curvature = EKFAC(fisher=fisher, seed=seed).fit(model, data, components=list(case.layers), batch_size=4)
    for component in curvature.components:
        dense = truth(model, component.name, data, seed if fisher == "sampled" else None)
        inverse = oracles.damped_inverse(oracles.ekfac(dense.factors, dense.gradients))
        gradients = normal(2, *component.shape)
        expected = (gradients.flatten(1) @ inverse).reshape(gradients.shape)
        torch.testing.assert_close(curvature.solve(component, gradients), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:EKFAC. too few positions")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("damping", [None, 0.05])
def test_scores_are_the_closed_form(name: str, damping: float | None) -> None:
    """g_qᵀ (G + damping)⁻¹ g_i with everything dense; G under sampled labels, gradients under their own."""
    case = CASES[name]
    model, data, queries = ready(case.build()), case.data(), case.data(n=3, seed=50)
    influence = InfluenceFunction(model, EKFAC(damping=damping), components=list(case.layers))
    scores = influence.fit(data).score(queries, data, per_component=True)
    for component, values in zip(influence.components, scores.values, strict=True):
        sampled = truth(model, component.name, data, seed=0)
        inverse = oracles.damped_inverse(oracles.ekfac(sampled.factors, sampled.gradients), damping)
        left, right = (truth(model, component.name, rows).gradients.flatten(1) for rows in (queries, data))
        torch.testing.assert_close(values, left @ inverse @ right.T, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:EKFAC. too few positions")
def test_exact_for_a_single_example() -> None:
    """One example with one position: S ⊗ A is its gradient's outer product."""
    model, data = mlp(), points(1)
    curvature = EKFAC(damping=0.1, fisher="empirical").fit(model, data)
    for component in curvature.components:
        rows = truth(model, component.name, data).gradients.flatten(1)
        gradients = normal(4, *component.shape)
        expected = gradients.flatten(1) @ oracles.damped_inverse(oracles.fisher(rows), 0.1)
        torch.testing.assert_close(curvature.solve(component, gradients).flatten(1), expected)


def test_components_without_kronecker_structure() -> None:
    """Norm and grouped convolution as they are, tied and embedding weights by their diagonal."""
    model, data = ready(Mixed()), token_rows(9)
    curvature = EKFAC(seed=2).fit(model, data, batch_size=4)
    kinds = {name: block.kind for name, block in curvature.blocks.items()}
    rest = {"norm": "dense", "mixer": "dense", "embedding": "diagonal"}
    assert kinds == {"up": "kronecker", "head": "kronecker", **rest}
    for component in (c for c in curvature.components if c.name in rest):
        own = {name: model.get_parameter(name) for name in component.parameters}
        found = oracles.example_gradients(own, lambda k: loss_of(model, data[k], k, 2), len(data))
        matrix = oracles.fisher(torch.cat([found[name].flatten(1) for name in own], dim=1))
        matrix = matrix.diagonal().diag() if rest[component.name] == "diagonal" else matrix
        gradients = normal(3, *component.shape)
        parts = [parameter_gradients(model, component, g) for g in (gradients, curvature.solve(component, gradients))]
        left, right = (torch.cat([part[name].flatten(1) for name in own], dim=1) for part in parts)
        torch.testing.assert_close(right, left @ oracles.damped_inverse(matrix), rtol=1e-8, atol=1e-8)
