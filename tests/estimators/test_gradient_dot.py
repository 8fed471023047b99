from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import GradientDot
from tests import oracles
from tests.curvature.models import Mixed, Tokens, loss_of, mlp, points, ready, texts, token_rows

CASES: dict[str, Any] = {
    "mlp": (mlp, points),
    "every kind of layer": (lambda: ready(Mixed()), token_rows),
    "padded text": (lambda: ready(Tokens()), texts),
}


def flat(model: nn.Module, data: list[Any]) -> Tensor:
    """Gradients of single examples [n, P], over all parameters."""
    parameters = dict(model.named_parameters())
    rows = oracles.example_gradients(parameters, lambda k: loss_of(model, data[k], k), len(data))
    return torch.cat([value.flatten(1) for value in rows.values()], dim=1)


@pytest.mark.parametrize("name", CASES)
def test_dot_products_of_whole_gradients(name: str) -> None:
    model, rows = CASES[name][0](), CASES[name][1]
    queries, train = rows(4, seed=3), rows(9)
    found = GradientDot(model, batch_size=4).score(queries, train)
    torch.testing.assert_close(found.values, flat(model, queries) @ flat(model, train).T, rtol=1e-10, atol=1e-10)
    assert found.formula == "<g_q, g_i>"
    assert found.damping is None


@pytest.mark.parametrize("name", CASES)
def test_normalised_is_the_cosine_of_whole_gradients(name: str) -> None:
    model, rows = CASES[name][0](), CASES[name][1]
    queries, train = rows(4, seed=3), rows(9)
    found = GradientDot(model, normalise=True).score(queries, train)
    expected = nn.functional.cosine_similarity(flat(model, queries)[:, None], flat(model, train)[None], dim=2)
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-10)
    assert found.formula == "<g_q, g_i>, unit gradients"
    itself = GradientDot(model, normalise=True).score(train, train).values
    torch.testing.assert_close(itself.diagonal(), torch.ones(9).double())


def test_a_positive_score_is_a_lower_loss_after_one_step() -> None:
    """The sign, and the size of the first order: a step of gradient descent on one training example."""
    model, train, [query] = mlp(), points(12), points(1, seed=3)
    scores = GradientDot(model).score([query], train).values[0]
    before = loss_of(model, query, 0).item()
    changes = []
    for k, row in enumerate(train):
        trained = copy.deepcopy(model)
        loss_of(trained, row, k).backward()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter -= 1e-6 * parameter.grad
        changes.append((loss_of(trained, query, 0).item() - before) / 1e-6)
    torch.testing.assert_close(torch.tensor(changes, dtype=torch.float64), -scores, rtol=1e-3, atol=1e-4)
    assert scores.max() > 0 > scores.min()


def test_gradients_are_not_changed() -> None:
    estimator = GradientDot(mlp())
    gradients = {"0": torch.ones(2, 4, 4)}
    assert estimator.transform(gradients)["0"] is gradients["0"]
