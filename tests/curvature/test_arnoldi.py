from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import InfluenceFunction
from lightning_influence.capture import find_components
from lightning_influence.curvature import Arnoldi, GaussNewtonProduct, HessianProduct
from lightning_influence.errors import StoreError
from lightning_influence.store import Store
from tests.curvature.models import mlp, normal, points

DATA = points(9)


def vectors(q: int = 3) -> dict[str, Tensor]:
    return {c.name: normal(q, *c.shape, seed=k) for k, c in enumerate(find_components(mlp()))}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in gradients.values()], dim=1)


def pairs_of(kind: Any) -> tuple[Tensor, Tensor]:
    """All eigenvalues, descending, and their vectors [P, P]."""
    product = kind(mlp(), find_components(mlp()), DATA)
    values, columns = torch.linalg.eigh(product(torch.eye(product.size, dtype=torch.float64)))
    return values.flip(0), columns.mT.flip(0)


@pytest.mark.parametrize(("product", "kind"), [("gauss-newton", GaussNewtonProduct), ("hessian", HessianProduct)])
@pytest.mark.parametrize("rank", [1, 5])
def test_influence_is_a_dot_product_along_the_leading_eigenvectors(rank: int, product: Any, kind: Any) -> None:
    curvature = Arnoldi(damping=0.01, product=product, rank=rank, steps=28, tolerance=1e-6).fit(mlp(), DATA)
    values, rows = (part[:rank] for part in pairs_of(kind))
    torch.testing.assert_close(curvature.eigenvalues, values)
    expected = flat(vectors()) @ rows.T / (values + 0.01) @ rows
    torch.testing.assert_close(flat(curvature.precondition(vectors())), expected)
    assert curvature.vectors.shape == (rank, 28)
    assert float(curvature.residuals.max()) < 1e-8


def test_a_component_has_the_block_of_the_low_rank_matrix() -> None:
    curvature = Arnoldi(damping=0.01, rank=3, steps=28).fit(mlp(), DATA)
    values, rows = (part[:3] for part in pairs_of(GaussNewtonProduct))
    component = curvature.components[1]
    block = (rows.T * values @ rows)[16:, 16:]
    found, basis = torch.linalg.eigh(block)
    kept = found > 1e-9
    gradients = vectors()["2"]
    expected = gradients.flatten(1) @ basis[:, kept] / (found[kept] + 0.01) @ basis[:, kept].T
    torch.testing.assert_close(curvature.solve(component, gradients).flatten(1), expected)


def test_no_more_is_kept_than_is_positive() -> None:
    values, _ = pairs_of(HessianProduct)
    positive = int((values > 1e-8).sum())
    assert positive < 28
    curvature = Arnoldi(damping=0.01, product="hessian", rank=28, steps=28).fit(mlp(), DATA)
    torch.testing.assert_close(curvature.eigenvalues, values[:positive])


def test_a_matrix_that_is_0_has_no_eigenpairs() -> None:
    curvature = Arnoldi(product="hessian", fisher="empirical")
    with pytest.raises(ValueError, match="found no positive eigenvalue; expected a matrix other than 0"):
        curvature.fit(mlp(nn.Linear(3, 2)), DATA, lambda model, batch: model(batch[0]).sum(1))


def test_pairs_that_have_not_converged_are_told() -> None:
    with pytest.warns(
        UserWarning, match=r"Arnoldi\(.*\): \d of 4 eigenpairs have not converged.* Raise steps, or lower"
    ):
        curvature = Arnoldi(damping=0.01, rank=4, steps=5).fit(mlp(), DATA)
    product = GaussNewtonProduct(mlp(), curvature.components, DATA)
    rest = product(curvature.vectors) - curvature.eigenvalues[:, None] * curvature.vectors
    torch.testing.assert_close(curvature.residuals, rest.norm(dim=1) / (curvature.eigenvalues + 0.01))


def test_after_fitting_the_model_is_not_needed(tmp_path: Any) -> None:
    model = mlp()
    curvature = Arnoldi(rank=4, steps=20).fit(model, DATA)
    expected = InfluenceFunction(model, curvature).score(points(3, seed=2), DATA).values
    store = Store.create(tmp_path, model, find_components(model))
    store.write_curvature("curvature", curvature)
    found = InfluenceFunction.from_store(model, tmp_path)
    assert torch.equal(found.score(points(3, seed=2), DATA).values, expected)
    before = flat(curvature.precondition(vectors()))
    with torch.no_grad():
        model[0].weight += 1
    assert torch.equal(flat(curvature.precondition(vectors())), before)


def test_a_state_of_another_model_is_refused() -> None:
    state = Arnoldi(rank=4, steps=20).fit(mlp(), DATA).state()
    with pytest.raises(StoreError, match=r"Arnoldi.load_state: vectors of 28 for 16 parameters"):
        Arnoldi().load_state(find_components(mlp())[:1], state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank=0\)`: expected an int >= 1"),
        ({"rank": 8, "steps": 7}, r"steps=7\)`: expected an int of at least rank=8; 3 times that, say"),
        ({"tolerance": 2.0}, r"tolerance=2.0\)`: expected a number in \(0, 1\)"),
        ({"product": "exact"}, r"product='exact'\)`: expected one of \['gauss-newton', 'hessian'\]"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"`Arnoldi\({message}"):
        Arnoldi(**options)
