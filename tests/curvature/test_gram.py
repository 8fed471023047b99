from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_influence import InfluenceFunction
from lightning_influence.capture import ExampleLoader, GradientCapture, find_components
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


def pca(data: Any = None, batch_size: int | None = 3, **options: Any) -> tuple[ProjectedGram, nn.Module, Any]:
    model, data = ready(Tokens()), texts() if data is None else data
    curvature = ProjectedGram((2, 3), initialisation="pca", **options)
    return curvature.fit(model, data, components=["up", "head"], batch_size=batch_size), model, data


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_leading_eigenvectors_of_the_moments(fisher: Any) -> None:
    """P_out and P_in span the largest directions of S and A; solving is the same formula."""
    curvature, model, data = pca(fisher=fisher, damping=0.02)
    for component in curvature.components:
        known = truth(model, component.name, data, 0 if fisher == "sampled" else None)
        a, s, _ = oracles.second_moments(known.factors)
        matrices = []
        for side, moments, k in (("outputs", s, 2), ("inputs", a, 3)):
            leading = torch.linalg.eigh(moments).eigenvectors[:, -k:]
            matrix = curvature.projection.matrix(component, side)
            torch.testing.assert_close(matrix.T @ matrix, leading @ leading.T)
            torch.testing.assert_close(matrix @ matrix.T, torch.eye(k).double())
            assert (torch.diff((matrix @ moments * matrix).sum(1)) <= 1e-12).all()  # the largest first
            matrices.append(matrix)
        p = torch.kron(*matrices)
        inverse = oracles.damped_inverse(oracles.fisher(known.gradients.flatten(1) @ p.T), 0.02)
        gradients = normal(2, *component.shape)
        torch.testing.assert_close(
            curvature.solve(component, gradients).flatten(1), gradients.flatten(1) @ p.T @ inverse @ p
        )


def test_eigenvectors_keep_more_than_random_matrices() -> None:
    curvature, model, data = pca(fisher="empirical")
    random = LoGra((2, 3)).start(curvature.components)
    for component in curvature.components:
        rows = truth(model, component.name, data).gradients.flatten(1)
        kept = []
        for projection in (curvature.projection, random):
            p = torch.kron(*(projection.matrix(component, side).double() for side in ("outputs", "inputs")))
            basis = torch.linalg.qr(p.T).Q
            kept.append(float((rows @ basis).square().sum()))
        assert kept[0] > kept[1]


def test_components_without_factors_stay_random() -> None:
    model, data = ready(Mixed()), token_rows(9)
    curvature = ProjectedGram((2, 2), initialisation="pca", projection_seed=4).fit(model, data)
    assert {name for name, _ in curvature.projection.given} == {"up", "head"}
    random = LoGra((2, 2), seed=4).start(curvature.components)
    for component in curvature.components:
        if component.name not in ("up", "head"):
            assert torch.equal(curvature.projection.matrix(component, "inputs"), random.matrix(component, "inputs"))


@pytest.mark.parametrize("batch_size", [1, 10])
def test_eigenvectors_do_not_depend_on_batches_and_are_stored(batch_size: int, tmp_path: Any) -> None:
    curvature, model, _ = pca()
    other, _, _ = pca(batch_size=batch_size)
    store = Store.create(tmp_path, model, list(curvature.components))
    store.write_curvature("c", curvature)
    found = Store.open(tmp_path).read_curvature("c")
    assert repr(found) == repr(curvature)
    for component in curvature.components:
        gradients = normal(2, *component.shape)
        expected = curvature.solve(component, gradients)
        torch.testing.assert_close(other.solve(component, gradients), expected)
        assert torch.equal(found.solve(component, gradients), expected)


def test_eigenvectors_from_parts_of_the_data() -> None:
    """What ranks do: sums of each pass are added up before it is finished."""
    whole, model, data = pca()
    parts = [ProjectedGram((2, 3), initialisation="pca") for _ in range(2)]
    with GradientCapture(model, ["up", "head"]) as capture:
        for part in parts:
            part.start(capture.components)
        for _ in range(2):
            for part, rows in zip(parts, (range(4), range(4, 10)), strict=True):
                for ids, batch in ExampleLoader(data, 3, indices=rows):
                    part.observe(capture, ids, batch)
            parts[0].merge(parts[1:])
            for key, total in parts[0].partial().items():
                parts[1].partial()[key].copy_(total)
            for part in parts:
                part.finish_pass()
    for component in whole.components:
        gradients = normal(2, *component.shape)
        for part in parts:
            torch.testing.assert_close(part.solve(component, gradients), whole.solve(component, gradients))


def test_bad_initialisation() -> None:
    with pytest.raises(ValueError, match=r"`ProjectedGram\(initialisation='svd'\)`: expected 'random' or 'pca'"):
        ProjectedGram(initialisation="svd")  # type: ignore[arg-type]
