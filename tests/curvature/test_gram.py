from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_influence import InfluenceFunction
from lightning_influence.capture import find_components
from lightning_influence.curvature import Exact, ProjectedGram
from lightning_influence.estimators.projected_dot import ProjectedDot
from lightning_influence.projections.logra import LoGra
from lightning_influence.store import Store
from tests import oracles
from tests.curvature.models import Mixed, Tokens, mlp, normal, points, ready, texts, token_rows, truth


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("damping", [None, 0.02])
@pytest.mark.parametrize("dimensions", [(2, 3), (1, 1), (3, 100)])
def test_solving_is_the_formula(dimensions: Any, damping: float | None, fisher: Any) -> None:
    """Pᵀ(F + λ)⁻¹P with P the Kronecker product of the two drawn matrices, all dense."""
    model, data = ready(Tokens()), texts()
    curvature = ProjectedGram(dimensions, damping=damping, fisher=fisher, projection_seed=4)
    curvature.fit(model, data, components=["up", "head"], batch_size=3)
    logra = LoGra(dimensions, seed=4).start(curvature.components)
    for component in curvature.components:
        rows = truth(model, component.name, data, 0 if fisher == "sampled" else None).gradients
        p = torch.kron(*(logra.matrix(component, side).double() for side in ("outputs", "inputs")))
        inverse = oracles.damped_inverse(oracles.fisher(rows.flatten(1) @ p.T), damping)
        gradients = normal(2, *component.shape)
        expected = gradients.flatten(1) @ p.T @ inverse @ p
        torch.testing.assert_close(curvature.solve(component, gradients).flatten(1), expected)


def test_influence_is_that_between_projected_gradients() -> None:
    model, train, queries = ready(Mixed()), token_rows(9), token_rows(3, seed=1)
    curvature = ProjectedGram((2, 2), damping=0.1, fisher="empirical").fit(model, train)
    found = InfluenceFunction(model, curvature).score(queries, train, per_component=True)
    dot = ProjectedDot(model, LoGra((2, 2)))
    left, right = dot.project(queries), dot.project(train)
    for values, component in zip(found.values, found.components, strict=True):
        part = dot.slices[component]
        inverse = oracles.damped_inverse(oracles.fisher(right[:, part]), 0.1)
        torch.testing.assert_close(values, left[:, part] @ inverse @ right[:, part].T)


def test_what_does_not_shrink_is_exact() -> None:
    model, data = ready(Mixed()), token_rows(9)
    curvature, exact = ProjectedGram(damping=0.1).fit(model, data), Exact(damping=0.1).fit(model, data)
    for component in curvature.components:
        gradients = normal(2, *component.shape)
        torch.testing.assert_close(curvature.solve(component, gradients), exact.solve(component, gradients))


@pytest.mark.parametrize("dimensions", [(2, 3), 12, 0.5])
def test_a_store_keeps_the_seed_and_the_gram(dimensions: Any, tmp_path: Any) -> None:
    model, data = mlp(), points()
    curvature = ProjectedGram(dimensions, projection_seed=7).fit(model, data)
    store = Store.create(tmp_path, model, find_components(model))
    store.write_curvature("c", curvature)
    found = Store.open(tmp_path).read_curvature("c")
    assert repr(found) == repr(curvature)
    for component in curvature.components:
        gradients = normal(2, *component.shape)
        assert torch.equal(found.solve(component, gradients), curvature.solve(component, gradients))
    other = ProjectedGram(dimensions, projection_seed=8).fit(model, data)
    gradients = normal(2, *component.shape)
    assert not torch.allclose(other.solve(component, gradients), curvature.solve(component, gradients))


def test_float32_gradients_stay_float32() -> None:
    model = mlp().float()
    curvature = ProjectedGram((2, 2)).fit(model, [(x.float(), y) for x, y in points()])
    gradients = {c.name: normal(2, *c.shape).float() for c in curvature.components}
    assert {g.dtype for g in curvature.precondition(gradients).values()} == {torch.float32}


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"`LoGra\(dimensions=\(0, 2\)\)`: expected a pair \(k_out, k_in\)"):
        ProjectedGram((0, 2))
    with pytest.raises(ValueError, match=r"`LoGra\(seed='1'\)`: expected an int"):
        ProjectedGram(projection_seed="1")
    with pytest.raises(ValueError, match=r"`LoGra\(dimensions=99\)`: expected at least one dimension for each of the"):
        ProjectedGram(99).fit(nn.Sequential(nn.Linear(3, 3)).double(), points())
