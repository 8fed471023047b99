from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import EKFAC, Estimator, FactoredProjection, GradientDot, InfluenceFunction, ProjectedDot
from lightning_influence.estimators import CKA
from lightning_influence.estimators.token_scores import TokenScores
from tests.curvature.models import Images, Mixed, Tokens, images, mlp, points, ready, texts, token_rows, truth


def influence(model: nn.Module, data: Any, **options: Any) -> Estimator:
    return InfluenceFunction(model, EKFAC(fisher="empirical"), **options).fit(data)


def dots(model: nn.Module, data: Any, **options: Any) -> Estimator:
    return GradientDot(model, **options)


MEMBERS: dict[str, Any] = {"GradientDot": dots, "InfluenceFunction": influence}
CASES: dict[str, Any] = {
    "padded text": (lambda: ready(Tokens()), texts),
    "every kind of layer": (lambda: ready(Mixed()), token_rows),
    "images": (lambda: ready(Images()), images),
    "points": (mlp, points),
}


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("memory_budget", [1, 10**9])
def test_positions_and_the_rest_add_up_to_the_score(name: str, case: str, normalise: bool, memory_budget: int) -> None:
    model, rows = CASES[case][0](), CASES[case][1]
    train, queries = rows(7), rows(3, seed=3)
    estimator = MEMBERS[name](model, train, normalise=normalise, batch_size=2, memory_budget=memory_budget)
    found, whole = estimator.token_scores(queries, train), estimator.score(queries, train, per_component=True)
    total = torch.stack([values.sum(1) for values in found.values], dim=1)
    torch.testing.assert_close(total + found.rest, whole.total())
    if case != "padded text":
        torch.testing.assert_close(found.rest, whole.total(found.whole))
    assert set(found.components) | set(found.whole) == set(whole.components or ())
    assert (found.query_ids, found.train_ids) == (whole.query_ids, whole.train_ids)
    assert (found.formula, found.reduction, found.damping) == (whole.formula, whole.reduction, whole.damping)


@pytest.mark.parametrize("layer", ["up", "head"])
def test_a_position_is_its_outer_product(layer: str) -> None:
    """From hooks on one example at a time: s_t^T V a_t, at the positions that are not padding."""
    model, train, queries = ready(Tokens()), texts(7), texts(3, seed=3)
    found = GradientDot(model, components=[layer]).token_scores(queries, train)
    v = truth(model, layer, queries).gradients
    for values, (inputs, gradients) in zip(found.values, truth(model, layer, train).factors, strict=True):
        expected = torch.stack([(gradients @ matrix * inputs).sum(1) for matrix in v])
        torch.testing.assert_close(values, expected)
    assert {values.shape[1] for values in found.values} == {4, 5, 6}
    assert (found.components, found.whole) == ((layer,), ())


def test_what_can_be_taken_apart() -> None:
    model, rows = ready(Mixed()), token_rows(4)
    found = GradientDot(model).token_scores(rows, rows)  # embedding and head are tied: 5 positions and 1
    assert (found.components, set(found.whole)) == (("up",), {"embedding", "norm", "mixer", "head"})
    found = GradientDot(ready(Tokens())).token_scores(texts(4), texts(4))
    assert (found.components, found.whole) == (("embedding", "up", "head"), ())
    found = GradientDot(ready(Images())).token_scores(images(2), images(2))
    assert (found.components, found.whole, found.values[0].shape) == (("first",), ("second", "head"), (2, 9))


def test_what_padding_adds_is_not_lost() -> None:
    """Before a sequence that is padded on the left, the last padding predicts its first token."""
    rows = texts(6)
    rest = GradientDot(ready(Tokens())).token_scores(rows, rows).rest
    assert [k for k in range(6) if (rest[:, k] != 0).any()] == [5]  # the first token of row 2 has no label


def test_for_the_mean_of_the_queries() -> None:
    model, train, queries = ready(Tokens()), texts(5), texts(3, seed=3)
    estimator = influence(model, train)
    rows, mean = estimator.token_scores(queries, train), estimator.token_scores(queries, train, aggregate="mean")
    assert mean.query_ids == ("mean",)
    for values, one in zip(rows.values, mean.values, strict=True):
        torch.testing.assert_close(one, values.mean(0, keepdim=True))


def test_nothing_to_take_apart() -> None:
    model, rows = ready(Tokens()), texts(3)
    for estimator in (CKA(model), ProjectedDot(model, FactoredProjection(1.0))):
        name = type(estimator).__name__
        with pytest.raises(
            ValueError, match=rf"`{name}.token_scores\(train\)`: none of the 3 components, such as \['e"
        ):
            estimator.token_scores(rows, rows)


class Varying(nn.Module):
    """As many positions as tokens behind the first layer; in the second, four and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()[:, :4]).mean(1)


def test_positions_that_are_there_at_times() -> None:
    rows = [(torch.randn(t, 3, generator=torch.Generator().manual_seed(t)).double(), torch.tensor(1)) for t in (4, 6)]
    with pytest.raises(
        ValueError, match="`token_scores`: second has as many positions as the examples in some batches"
    ):
        GradientDot(ready(Varying()), batch_size=1).token_scores(rows, rows)


def test_labels_must_fit() -> None:
    with pytest.raises(
        ValueError, match=r"expected 1 of shape \[1, positions\] and \[1, 1\] from the labels, got \[\(2"
    ):
        TokenScores((torch.zeros(2, 3),), torch.zeros(1, 1), ("q",), (0,), ("a",), (), "dot", "sum")
    found = TokenScores((torch.zeros(1, 3),), torch.zeros(1, 1), ("q",), (0,), ("a",), (), "dot", "sum")
    assert repr(found) == "TokenScores(1 queries x 3 positions of 1 training examples, formula='dot')"
