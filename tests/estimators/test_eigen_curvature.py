from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import EKFAC, KFAC, GroupInfluence
from lightning_influence.estimators.eigen_curvature import EigenCurvature
from lightning_influence.estimators.newton_step import IndefiniteError, newton_shift
from tests import oracles
from tests.curvature.models import mlp, points, truth

TRAIN, TARGETS = points(15), points(4, seed=3)
GROUPS: list[Any] = [[0], [3, 1], [7, 2, 5, 0, 11], list(range(14)), []]


def gradients(model: nn.Module, data: list[Any], seed: int | None = None) -> Tensor:
    return torch.cat([truth(model, name, data, seed).gradients.flatten(1) for name in ("0", "2")], dim=1)


def basis_and_eigenvalues(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Q [P, P] and Lambda [P] of EK-FAC, from dense covariances."""
    bases, spectra = [], []
    for name in ("0", "2"):
        block = truth(model, name, TRAIN, 0)
        inputs, outputs, _ = oracles.second_moments(block.factors)
        bases.append(torch.kron(torch.linalg.eigh(outputs)[1], torch.linalg.eigh(inputs)[1]))
        spectra.append((block.gradients.flatten(1) @ bases[-1]).square().mean(0))
    return torch.block_diag(*bases), torch.cat(spectra)


@pytest.mark.parametrize("change", ["removal", "addition"])
def test_the_newton_step_is_that_of_ekfac_without_the_group(change: str) -> None:
    model = mlp()
    influence = GroupInfluence(model, EKFAC(damping=0.01), group_curvature="eigenvalues", progress=False)
    influence.fit(TRAIN, TARGETS)
    basis, spectrum = basis_and_eigenvalues(model)
    squares = (gradients(model, TRAIN, 0) @ basis).square()
    own = torch.stack([basis @ torch.diag(row) @ basis.T for row in squares])
    hessian = basis @ torch.diag(spectrum + 0.01) @ basis.T
    target = oracles.fisher(gradients(model, TARGETS))
    pieces = (gradients(model, TRAIN), hessian, own, gradients(model, TARGETS).mean(0), target)
    for method, values in influence.table(GROUPS, change=change).items():  # type: ignore[arg-type]
        wanted = [oracles.group_estimate(*pieces, group, method, change, 1 / 15) for group in GROUPS]
        torch.testing.assert_close(values, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-9)
        if method.endswith("B"):
            pairs = influence.interactions(method=method).estimates(GROUPS, change)  # type: ignore[arg-type]
            torch.testing.assert_close(pairs, values)


@pytest.mark.parametrize("options", [{}, {"fisher": "empirical"}, {"damping_share": 1e-3}, {"covariance_share": 0.5}])
def test_removals_are_always_defined_where_members_are_training_data(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    influence = GroupInfluence(model, EKFAC(**options), group_curvature="eigenvalues", progress=False)
    found = influence.fit(TRAIN, TARGETS).estimates([range(15), *GROUPS])
    assert found.isfinite().all()
    assert found[-1] == 0
    effects = influence.effects([7, 2, 5])
    assert effects.estimate([5, 7], "F+B") == pytest.approx(influence.estimate([5, 7], "F+B"))


def test_in_single_precision() -> None:
    model = mlp()
    found = []
    for network, dtype in ((model, torch.float64), (mlp().float(), torch.float32)):
        train, targets = ([(x.to(dtype), y) for x, y in data] for data in (TRAIN, TARGETS))
        influence = GroupInfluence(network, EKFAC(damping=0.01), group_curvature="eigenvalues", progress=False)
        found.append(influence.fit(train, targets).table(GROUPS))
    for method, values in found[0].items():
        torch.testing.assert_close(found[1][method], values, rtol=1e-3, atol=1e-4)


def test_more_curvature_than_there_is() -> None:
    influence = GroupInfluence(mlp(), EKFAC(damping=1e-6), group_curvature="eigenvalues", progress=False)
    influence.fit(TRAIN, TARGETS, weight=1.0)
    with pytest.raises(ValueError, match="takes away more curvature than there is") as caught:
        influence.estimates([[7, 2, 5]])
    extra = float(re.search(r"Add more than (\S+)", str(caught.value)).group(1))  # type: ignore[union-attr]
    again = GroupInfluence(mlp(), EKFAC(damping=1e-6 + 1.01 * extra), group_curvature="eigenvalues", progress=False)
    assert again.fit(TRAIN, TARGETS, weight=1.0).estimates([[7, 2, 5]]).isfinite().all()
    less = EKFAC(damping=0.9 * extra)
    with pytest.raises(ValueError, match="more curvature"):
        GroupInfluence(mlp(), less, group_curvature="eigenvalues").fit(TRAIN, TARGETS, weight=1.0).estimates(
            [[7, 2, 5]]
        )


def test_one_row_in_its_own_basis_is_woodbury() -> None:
    """With gradients along the axes the diagonal is everything."""
    h, axes = torch.tensor([2.0, 3.0, 5.0]).double(), 1.5 * torch.eye(3).double()
    own = EigenCurvature(axes.square() / h, h, lambda vector, factors: vector * factors)
    first = torch.tensor([1.0, -2.0, 0.5]).double()
    for sign in (1.0, -1.0):
        wanted = newton_shift(first, axes[:2], axes[:2] / h, 0.3, sign)
        torch.testing.assert_close(own.newton_shift(first, [0, 1], 0.3, sign), wanted)
    with pytest.raises(IndefiniteError) as caught:
        own.newton_shift(first, [0], 1.0, 1.0)
    assert (caught.value.largest, caught.value.damping) == (pytest.approx(1.125), pytest.approx(0.25))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 2}, "(draws=2, group_curvature='eigenvalues')`: expected 1, the labels"),
        ({"curvature": "cg"}, "expected EKFAC() or"),
    ],
)
def test_what_has_no_eigenvalues_is_refused(options: dict[str, Any], message: str) -> None:
    curvature = object() if options.pop("curvature", None) else KFAC()
    with pytest.raises(ValueError, match=re.escape(message)):
        GroupInfluence(mlp(), curvature, group_curvature="eigenvalues", **options)  # type: ignore[arg-type]
