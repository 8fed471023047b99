from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence import EKFAC, KFAC, Exact, GaussNewtonProduct, GradientCapture, ProjectedGram
from lightning_influence.estimators.gradient_coordinates import (
    Coordinates,
    ProjectedGradients,
    WholeGradients,
    coordinates_of,
)
from tests.curvature.models import Mixed, normal, ready, token_rows

TRAIN = token_rows(9)
CURVATURES: dict[str, Any] = {
    "EKFAC": lambda: EKFAC(damping=0.1),
    "Exact": lambda: Exact(damping=0.1),
    "ProjectedGram": lambda: ProjectedGram((2, 3), damping=0.1),
}


def made(name: str) -> Coordinates:
    model = ready(Mixed())
    curvature = CURVATURES[name]().fit(model, TRAIN)
    return coordinates_of(curvature.components, curvature)


def test_the_curvature_decides() -> None:
    assert isinstance(made("ProjectedGram"), ProjectedGradients)
    assert isinstance(made("EKFAC"), WholeGradients)


@pytest.mark.parametrize("name", CURVATURES)
def test_rows_are_the_adjoint_of_vectors(name: str) -> None:
    found = made(name)
    rows = normal(3, found.size)
    given = {c.name: normal(2, *c.shape, seed=k) for k, c in enumerate(found.components)}
    assert found.rows(given).shape == (2, found.size)
    inner = sum(found.vectors(rows)[key].flatten(1) @ given[key].flatten(1).T for key in given)
    torch.testing.assert_close(inner, rows @ found.rows(given).T)


@pytest.mark.parametrize("name", CURVATURES)
def test_solved_rows_give_the_influence(name: str) -> None:
    """⟨u_i, g_j⟩ in the coordinates is ⟨H⁻¹ g_i, g_j⟩ of whole gradients."""
    found = made(name)
    given = {c.name: normal(3, *c.shape, seed=k) for k, c in enumerate(found.components)}
    rows, solved = found.rows(given), found.curvature.precondition(given)
    truth = sum(solved[key].flatten(1) @ given[key].flatten(1).T for key in given)
    torch.testing.assert_close(found.solve(rows) @ rows.T, truth)


@pytest.mark.parametrize("name", CURVATURES)
def test_gradients_of_records_are_those_rows(name: str) -> None:
    found, model = made(name), ready(Mixed())
    batch = [torch.stack(part) for part in zip(*TRAIN, strict=True)]
    losses = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")  # noqa: E731
    with GradientCapture(model) as capture:
        records = dict(zip((c.name for c in capture.components), capture.record(batch, losses), strict=True))
    rows = torch.cat([found.of(c, records[c.name]) for c in found.components], dim=1)
    whole = {name: record.example_gradients() for name, record in records.items()}
    torch.testing.assert_close(rows, found.rows(whole))


@pytest.mark.parametrize("name", CURVATURES)
def test_other_curvatures_are_applied_between_vectors_and_rows(name: str) -> None:
    found, model = made(name), ready(Mixed())
    rows = normal(3, found.size)
    dense: Tensor = torch.cat(
        [part.flatten(1) for part in found.vectors(torch.eye(found.size).double()).values()], dim=1
    )
    product = GaussNewtonProduct(model, found.components, TRAIN)
    matrix = product(torch.eye(product.size).double())
    torch.testing.assert_close(found.product(product, rows), rows @ dense @ matrix @ dense.T)
    target = KFAC().fit(model, token_rows(4, seed=3))
    moved = target.multiply(found.vectors(rows))
    torch.testing.assert_close(found.multiply(target, rows), found.rows(moved))
