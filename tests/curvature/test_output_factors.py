from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import ClassificationLoss, FunctionLoss, GaussNewtonProduct, LanguageModelLoss, RegressionLoss
from lightning_influence.capture import ExampleLoader, GradientCapture
from lightning_influence.curvature.output_factors import OutputFactors
from tests.curvature.models import Images, Mixed, Tokens, images, mlp, normal, points, ready, texts, token_rows

BINARY = [(x, (y > 0).long()) for x, y in points(6)]
CASES: dict[str, tuple[Any, Any, Any, int]] = {
    "classes": (mlp, points(6), ClassificationLoss(), 3),
    "one logit": (lambda: mlp(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), BINARY, ClassificationLoss(), 1),
    "regression": (
        lambda: mlp(nn.Linear(3, 2)),
        list(zip(normal(6, 3), normal(6, 2, seed=1), strict=True)),
        RegressionLoss(),
        2,
    ),
    "tied": (lambda: ready(Mixed()), token_rows(6), ClassificationLoss(), 7),
    "images": (lambda: ready(Images()), images(6), ClassificationLoss(), 3),
    "some without a label": (
        mlp,
        [(x, torch.tensor(-100) if k % 2 else y) for k, (x, y) in enumerate(points(6))],
        ClassificationLoss(),
        3,
    ),
}


def factor_rows(model: nn.Module, data: Any, loss: Any, batch_size: int = 4) -> Tensor:
    """[n, o, P]."""
    factors, loader = OutputFactors(loss), ExampleLoader(data, batch_size)
    count = factors.count(model, next(iter(loader))[1])
    with GradientCapture(model) as capture:
        columns = [
            torch.cat(
                [
                    torch.cat(
                        [r.example_gradients().flatten(1) for r in capture.record(batch, factors.losses(k), ids)], 1
                    )
                    for ids, batch in loader
                ]
            )
            for k in range(count)
        ]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("name", CASES)
def test_they_add_up_to_the_gauss_newton_matrix(name: str) -> None:
    build, data, loss, outputs = CASES[name]
    model = build()
    rows = factor_rows(model, data, loss)
    assert rows.shape[1] == outputs
    with GradientCapture(model) as capture:
        components = capture.components
    for k in range(len(data)):
        product = GaussNewtonProduct(model, components, [data[k]], loss)
        torch.testing.assert_close(rows[k].T @ rows[k], product(torch.eye(rows.shape[2]).double()))


def test_batches_do_not_matter() -> None:
    one, other = (factor_rows(mlp(), points(6), ClassificationLoss(), size) for size in (1, 6))
    torch.testing.assert_close(one.mT @ one, other.mT @ other)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_narrow_models(dtype: torch.dtype, tolerance: float) -> None:
    narrow = [(x.to(dtype), y) for x, y in points(6)]
    expected, found = (
        factor_rows(mlp(), points(6), ClassificationLoss()),
        factor_rows(mlp().to(dtype), narrow, ClassificationLoss()),
    )
    assert found.dtype == torch.float32
    expected, found = expected.mT @ expected, (found.mT @ found).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_they_know_no_label() -> None:
    flipped = [(x, 2 - y) for x, y in points(6)]
    one, other = (factor_rows(mlp(), data, ClassificationLoss()) for data in (points(6), flipped))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("model", "data", "loss", "message"),
    [
        (
            ready(Tokens()),
            texts(2),
            LanguageModelLoss(),
            "Tokens returns outputs of shape (2, 6, 7); expected [n] or [n, o]",
        ),
        (
            mlp(nn.Linear(3, 2)),
            points(2),
            FunctionLoss(lambda model, batch: model(batch[0]).sin().sum(1)),
            "the loss (FunctionLoss) is not convex in what the model returns",
        ),
        (
            mlp(nn.Linear(3, 2)),
            points(2),
            FunctionLoss(lambda model, batch: (model(batch[0]) * model(batch[0])).sum(1)),
            "the loss (FunctionLoss) called Sequential 2 times; expected once",
        ),
    ],
)
def test_what_has_no_such_factors(model: Any, data: Any, loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        factor_rows(model, data, loss)
