from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence import ExampleLoader, Identity, InfluenceFunction
from lightning_influence.estimators.gradient_coordinates import WholeGradients
from lightning_influence.estimators.gradient_rows import GradientRows
from tests import oracles
from tests.curvature.models import Tokens, loss_of, mlp, points, ready, texts

DATA = points(7)


def taken(kind: str, draws: int = 1, batch_size: int = 3, seed: int = 5) -> Tensor:
    influence = InfluenceFunction(mlp(), Identity(), progress=False)
    coordinates = WholeGradients(influence.components, influence.curvature)
    return GradientRows(influence, draws).of(ExampleLoader(DATA, batch_size), coordinates, kind, seed)


def one_by_one(seed: int | None) -> Tensor:
    """Gradients with the bias as a column, as the coordinates have it."""
    model = mlp()
    found = oracles.example_gradients(
        dict(model.named_parameters()), lambda k: loss_of(model, DATA[k], k, seed), len(DATA)
    )
    first = torch.cat([found["0.weight"], found["0.bias"][..., None]], dim=2)
    return torch.cat([first.flatten(1), found["2.weight"].flatten(1)], dim=1)


def test_own_labels() -> None:
    torch.testing.assert_close(taken("empirical"), one_by_one(None)[:, None])


@pytest.mark.parametrize("draws", [1, 3])
def test_drawn_labels(draws: int) -> None:
    """A draw has the seed that follows the last one's; outer products add up to the mean over draws."""
    expected = torch.stack([one_by_one(5 + k) for k in range(draws)], dim=1) / draws**0.5
    torch.testing.assert_close(taken("sampled", draws), expected)


def test_many_draws_come_close_to_the_gauss_newton_matrix() -> None:
    exact, drawn = (torch.einsum("nsp,nsq->npq", rows, rows) for rows in (taken("gauss-newton"), taken("sampled", 400)))
    assert (drawn - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("kind", ["empirical", "sampled", "gauss-newton"])
def test_batches_do_not_matter(kind: str) -> None:
    torch.testing.assert_close(taken(kind, batch_size=1), taken(kind, batch_size=7))


def test_the_mean_and_sizes() -> None:
    influence = InfluenceFunction(mlp(), Identity(), progress=False)
    coordinates, loader = WholeGradients(influence.components, influence.curvature), ExampleLoader(DATA, 3)
    rows = GradientRows(influence, draws=4)
    torch.testing.assert_close(rows.mean(loader, coordinates), one_by_one(None).mean(0))
    assert [rows.count(loader, kind) for kind in ("empirical", "sampled", "gauss-newton")] == [1, 4, 3]
    assert rows.bytes(loader, coordinates, "sampled") == 4 * 28 * 8


def test_a_language_model_has_too_many_outputs() -> None:
    influence = InfluenceFunction(ready(Tokens()), Identity(), progress=False)
    rows: Any = GradientRows(influence, 1)
    with pytest.raises(ValueError, match=re.escape("expected [n] or [n, o] with o <= 128")):
        rows.count(ExampleLoader(texts(2)), "gauss-newton")
