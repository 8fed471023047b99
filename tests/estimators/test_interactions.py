from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.estimators.interactions import Interactions
from lightning_influence.selection import Constraints, InteractionGreedy
from tests import oracles
from tests.estimators.retraining import digits, neighbours, retrained_changes, spearman

CHANGES = ("removal", "addition")
GROUPS = [[0], [3, 1], [7, 2, 5, 0, 11], list(range(12)), []]


@dataclass(frozen=True)
class Problem:
    """n = 12 examples, p = 5 parameters and a target with dense H and H_f, neither from a model."""

    gradients: Tensor
    hessian: Tensor
    target_gradients: Tensor
    target_hessian: Tensor
    weight: float

    @property
    def shifts(self) -> Tensor:
        return oracles.parameter_shifts(self.gradients, self.hessian, self.weight)

    @property
    def target_gradient(self) -> Tensor:
        return self.target_gradients.mean(dim=0)

    @property
    def scores(self) -> Tensor:
        return self.target_gradients @ torch.linalg.inv(self.hessian) @ self.gradients.T

    def truth(self, rows: list[int], change: str, interactions: bool, target_hessian: Tensor | None = None) -> float:
        hessian = self.target_hessian if target_hessian is None else target_hessian
        return oracles.group_influence(self.shifts, self.target_gradient, hessian, rows, change, interactions)


def problem(seed: int = 0, weight: float = 1 / 12) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root, half = normal(5, 5), normal(5, 5)
    return Problem(normal(12, 5), root @ root.T + torch.eye(5), normal(4, 5), half + half.T, weight)


def explicit(case: Problem, **changes: Any) -> Interactions:
    """F = u and M = H_f."""
    arguments: dict[str, Any] = {
        "values": case.shifts @ case.target_gradient,
        "features": case.shifts,
        "metric": case.target_hessian,
        "ids": range(12),
        "weight": case.weight,
    }
    return Interactions(**{**arguments, **changes})


@given(seed=st.integers(0, 10**6), weight=st.sampled_from([1 / 12, 1 / 3, 1.0]))
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("interactions", [False, True])
def test_equals_dense_formulas(change: str, interactions: bool, seed: int, weight: float) -> None:
    case = problem(seed, weight)
    estimates = explicit(case).estimates(GROUPS, change, interactions)
    truth = [case.truth(rows, change, interactions) for rows in GROUPS]
    torch.testing.assert_close(estimates, torch.tensor(truth, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@given(seed=st.integers(0, 10**6), weight=st.sampled_from([None, 1 / 3]))
@pytest.mark.parametrize("change", CHANGES)
def test_scores_give_the_empirical_fisher(change: str, seed: int, weight: float | None) -> None:
    case = problem(seed, 1 / 12 if weight is None else weight)
    fisher = case.target_gradients.T @ case.target_gradients / 4
    estimates = Interactions.from_scores(case.scores, weight).estimates(GROUPS, change)
    truth = [case.truth(rows, change, True, fisher) for rows in GROUPS]
    torch.testing.assert_close(estimates, torch.tensor(truth, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_curvature_scores_give_another_fisher() -> None:
    case, other = problem(), problem(1)
    sampled = other.target_gradients[:3]
    fisher = sampled.T @ sampled / 3
    scores = sampled @ torch.linalg.inv(case.hessian) @ case.gradients.T
    interactions = Interactions.from_scores(case.scores, curvature_scores=scores)
    for rows in GROUPS:
        assert interactions.estimate(rows) == pytest.approx(case.truth(rows, "removal", True, fisher), abs=1e-12)
    assert interactions.target_curvature == "sampled Fisher"


@pytest.mark.parametrize("sampled", [False, True])
def test_shares_of_targets(sampled: bool) -> None:
    """f = Σ_t a_t ℓ_t, one term after the other; a target without a share needs no feature."""
    table, drawn = problem().scores, problem(1).scores
    shares = torch.tensor([0.5, -0.2, 0.0, 1.0]).double()
    values, pairs = torch.zeros(12).double(), torch.zeros(12, 12).double()
    for share, row, fisher in zip(shares, table, drawn if sampled else table, strict=True):
        values += 0.3 * share * row
        pairs += 0.3**2 * share * torch.outer(fisher, fisher)
    found = Interactions.from_scores(table, 0.3, drawn if sampled else None, shares=shares)
    torch.testing.assert_close(found.values, values)
    torch.testing.assert_close(found.pairwise(range(12)), pairs)
    assert found.features.shape == (12, 3)
    even = Interactions.from_scores(table, 0.3, shares=torch.full((4,), 0.25))
    assert even.metric is None
    torch.testing.assert_close(even.features, Interactions.from_scores(table, 0.3).features)


def test_sum_over_pairs() -> None:
    interactions = explicit(problem())
    for group in GROUPS:
        pairs = interactions.pairwise(group)
        quadratic = 2 * (interactions.estimate(group) - interactions.first_order(group))
        assert float(pairs.sum()) == pytest.approx(quadratic, abs=1e-12)
        twice_above = pairs.diagonal().sum() + 2 * pairs.triu(1).sum()
        assert float(twice_above) == pytest.approx(quadratic, abs=1e-12)


def test_pairwise_blocks() -> None:
    case = problem()
    dense = case.shifts @ case.target_hessian @ case.shifts.T
    torch.testing.assert_close(explicit(case).pairwise([4, 0], [1, 4, 7]), dense[[4, 0]][:, [1, 4, 7]])


@pytest.mark.parametrize("group", GROUPS)
def test_signs(group: list[int]) -> None:
    """Adding is removing the other way: the first order flips, the interactions do not."""
    interactions = explicit(problem())
    removal, addition = (interactions.estimate(group, change) for change in CHANGES)
    first = interactions.first_order(group)
    assert interactions.estimate(group, "addition", interactions=False) == pytest.approx(-first)
    assert removal - addition == pytest.approx(2 * first)
    assert removal + addition == pytest.approx(float(interactions.pairwise(group).sum()), abs=1e-12)


def test_groups_are_named_by_ids() -> None:
    case = problem()
    names = [f"row {row}" for row in range(12)]
    assert explicit(case, ids=names).estimate(["row 3", "row 1"]) == explicit(case).estimate([3, 1])
    assert explicit(case).estimate(torch.tensor([3, 1])) == explicit(case).estimate((1, 3))


def test_selection_minimises_the_addition_estimate() -> None:
    case = problem()
    interactions = explicit(case, ids=[f"{row:02}" for row in range(12)])
    selection = interactions.select(InteractionGreedy(), 0.5)
    dense = interactions.pairwise(interactions.ids)
    truth = oracles.greedy(interactions.values, dense, 6, interactions.ids)
    assert list(selection.positions) == truth
    assert selection.objective == pytest.approx(interactions.estimate(selection.ids, "addition"), abs=1e-12)
    [first, *_] = selection.ids
    others = interactions.select(InteractionGreedy(), 3, Constraints(exclude=[first]))
    assert (first in others.ids, len(others)) == (False, 3)


@dataclass(frozen=True)
class Labelled:
    """What `from_scores` needs of `Scores`."""

    values: Tensor
    train_ids: tuple[int | str, ...]
    query_ids: tuple[int | str, ...] = ("q0", "q1", "q2", "q3")
    damping: float | str | None = "0.1 of the mean"
    reduction: str = "mean"

    def total(self) -> Tensor:
        return self.values.sum(dim=0)


def test_labelled_scores() -> None:
    case = problem()
    names = tuple(f"row {row}" for row in range(12))
    halves = torch.stack([case.scores, case.scores]) / 2
    interactions = Interactions.from_scores(Labelled(halves, names))
    plain = Interactions.from_scores(case.scores)
    assert interactions.ids == names
    assert interactions.weight == 1 / 12
    assert (interactions.reduction, interactions.damping) == ("mean", "0.1 of the mean")
    assert interactions.target_curvature == "empirical Fisher"
    assert interactions.estimate(["row 3", "row 1"]) == pytest.approx(plain.estimate([3, 1]))
    assert Interactions.from_scores(Labelled(halves, names), ids=range(12)).ids == tuple(range(12))
    mixed = Interactions.from_scores(Labelled(halves, names), curvature_scores=case.scores)
    assert mixed.estimate(["row 3"]) == pytest.approx(plain.estimate([3]))
    assert Interactions.from_scores(case.scores, target_curvature="mine").target_curvature == "mine"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_small_scores_do_not_vanish(dtype: torch.dtype) -> None:
    scores = torch.full((4, 10), 2**-14).to(dtype)
    interactions = Interactions.from_scores(scores, weight=1e-6)
    assert interactions.features.dtype == torch.float32
    torch.testing.assert_close(interactions.values, torch.full((10,), 1e-6 * 2**-14, dtype=torch.float64))
    assert float(interactions.pairwise([0])) == pytest.approx((1e-6 * 2**-14) ** 2, rel=1e-6)


def test_inputs_are_untouched() -> None:
    for targets in (1, 4):
        scores = problem().scores[:targets]
        before = scores.clone()
        Interactions.from_scores(scores, curvature_scores=scores)
        assert torch.equal(scores, before)


# Logistic regression, where everything is known


def binary(n: int = 60, d: int = 4, decay: float = 0.05) -> tuple[Tensor, Tensor, Tensor, Interactions, Tensor]:
    """Inputs, labels, parameters at the minimum, interactions with exact H and H_f, and M = H⁻¹ H_f H⁻¹."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, d, generator=generator, dtype=torch.float64)
    direction = torch.randn(d, generator=generator, dtype=torch.float64)
    labels = (inputs @ direction + torch.randn(n, generator=generator, dtype=torch.float64) > 0).double()
    theta = oracles.fit_binary(inputs, labels, decay)
    hessian = oracles.binary_hessian(inputs, theta, decay)
    target = torch.randn(40, d, generator=generator, dtype=torch.float64)
    target_hessian = oracles.binary_hessian(target, theta, 0.0)
    target_gradient = oracles.binary_gradients(target, (target @ direction > 0).double(), theta).mean(dim=0)
    shifts = oracles.parameter_shifts(oracles.binary_gradients(inputs, labels, theta), hessian, 1 / n)
    interactions = Interactions(shifts @ target_gradient, shifts, target_hessian, ids=range(n), weight=1 / n)
    inverse = torch.linalg.inv(hessian)
    return inputs, labels, theta, interactions, inverse @ target_hessian @ inverse


def test_closed_form_for_binary_logistic_regression() -> None:
    """Proposition 1 of [IA]."""
    inputs, labels, theta, interactions, metric = binary()
    n = len(labels)
    errors = oracles.binary_probabilities(inputs, theta) - labels
    closed = errors[:, None] * errors[None, :] * (inputs @ metric @ inputs.T) / n**2
    torch.testing.assert_close(interactions.pairwise(range(n)), closed, rtol=1e-10, atol=1e-16)


def test_sign_structure_for_binary_logistic_regression() -> None:
    """Among alike inputs (x_iᵀ M x_j > 0) K is positive within a class and negative across; else reversed."""
    inputs, labels, _, interactions, metric = binary()
    pairs = interactions.pairwise(range(len(labels)))
    alike = inputs @ metric @ inputs.T > 0
    same_class = labels[:, None] == labels[None, :]
    assert torch.equal(pairs > 0, alike == same_class)
    assert {(bool(a), bool(s)) for a, s in zip(alike.flatten(), same_class.flatten(), strict=True)} == {
        (a, s) for a in (False, True) for s in (False, True)
    }


def on_digits(decay: float = 0.01) -> tuple[Tensor, Interactions]:
    inputs, labels, target, target_labels = digits()
    theta = oracles.fit_softmax(inputs, labels, 3, decay)
    gradients = oracles.softmax_gradients(inputs, labels, theta)
    shifts = torch.linalg.solve(oracles.softmax_hessian(inputs, theta, decay), gradients.T).T / 300
    values = shifts @ oracles.softmax_gradients(target, target_labels, theta).mean(dim=0)
    metric = oracles.softmax_hessian(target, theta, 0.0)
    return theta, Interactions(values, shifts, metric, ids=range(300), weight=1 / 300)


def test_closed_form_for_several_classes() -> None:
    """K_ij = (1/n²)(p_i − e_{y_i})ᵀ [J_iᵀ M J_j] (p_j − e_{y_j}); the logits' Jacobian is I ⊗ x."""
    inputs, labels, target, _ = digits()
    theta, interactions = on_digits()
    inverse = torch.linalg.inv(oracles.softmax_hessian(inputs, theta, 0.01))
    metric = inverse @ oracles.softmax_hessian(target, theta, 0.0) @ inverse
    errors = oracles.softmax_probabilities(inputs, theta) - torch.nn.functional.one_hot(labels, 3)
    jacobians = [torch.kron(torch.eye(3).double(), x[:, None]) for x in inputs[:6]]
    closed = [
        [float(errors[i] @ (jacobians[i].T @ metric @ jacobians[j]) @ errors[j]) for j in range(6)] for i in range(6)
    ]
    torch.testing.assert_close(interactions.pairwise(range(6)), torch.tensor(closed, dtype=torch.float64) / 300**2)


@pytest.mark.parametrize(("size", "decay"), [(15, 0.01), (30, 0.01), (30, 0.1)])
def test_interactions_bring_the_estimate_closer_to_retraining(size: int, decay: float) -> None:
    """40 groups of nearest neighbours in softmax space, 5 or 10 % of a convex model's training set, left out."""
    inputs, labels, target, target_labels = digits()
    theta, interactions = on_digits(decay)
    groups = neighbours(inputs, theta, size)
    truth = retrained_changes(inputs, labels, target, target_labels, theta, groups, decay)
    first_order = interactions.estimates(groups, interactions=False)
    with_interactions = interactions.estimates(groups)
    assert (with_interactions - truth).abs().mean() < 0.85 * (first_order - truth).abs().mean()
    assert spearman(with_interactions, truth) > spearman(first_order, truth)


# Bad input


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_bad_groups() -> None:
    interactions = explicit(problem())
    with refused("`Interactions`: expected a group of the 12 examples it was made of. Unknown: ids 12, '3'."):
        interactions.estimate([0, 12, "3"])
    with refused("`Interactions`: expected each example of a group once. Repeated: id 3."):
        interactions.pairwise([3, 1, 3])
    with refused("`Interactions.estimates(change='remove')`: expected 'removal' or 'addition'."):
        interactions.estimate([0], "remove")


WEIGHT = (
    "expected a number > 0, such as 1/n for n training examples, or 1/k when the model will be trained on k selected "
    "examples alone."
)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), True, "1/n"])
def test_bad_weights(weight: Any) -> None:
    with refused(f"`Interactions(weight={weight!r})`: {WEIGHT}"):
        explicit(problem(), weight=weight)
    with refused(f"`Interactions.from_scores(weight={weight!r})`: {WEIGHT}"):
        Interactions.from_scores(torch.ones(2, 3), weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": range(11)}, "`Interactions(ids)`: expected one id for each of the 12 values. Got 11."),
        (
            {"features": torch.full((12, 5), torch.nan)},
            "`Interactions(features)`: expected finite numbers. 12 of 12 examples have NaN or infinite features: "
            "ids 0, 1, 2, 3, 4, ... (7 more). Look at their loss, or leave them out.",
        ),
    ],
)
def test_bad_parts(changes: dict[str, Any], message: str) -> None:
    with refused(message):
        explicit(problem(), **changes)


SCORES = "expected a real tensor [m, n] with m >= 1 target and n >= 1 pool examples, summed over components."


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 4), (4, 0)])
def test_bad_shapes_of_scores(shape: tuple[int, ...]) -> None:
    with refused(f"`Interactions.from_scores(scores)`: {SCORES} Got shape {list(shape)}."):
        Interactions.from_scores(torch.ones(shape))
    with refused(f"`Interactions.from_scores(curvature_scores)`: {SCORES} Got shape {list(shape)}."):
        Interactions.from_scores(torch.ones(3, 4), curvature_scores=torch.ones(shape))


SHARES = "expected one finite number for each of 2 targets, not all of them 0, and as many curvature scores."


def labelled(*names: str, scores: Tensor | None = None) -> Labelled:
    return Labelled(torch.ones(1, 4, len(names)) if scores is None else scores[None], names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"scores": torch.ones(2, 3), "curvature_scores": torch.ones(2, 4)},
            "(curvature_scores)`: expected the pool of the scores, 3 columns. Got 4.",
        ),
        (
            {"scores": labelled("a", "b"), "curvature_scores": labelled("b", "a")},
            "(curvature_scores)`: expected the pool of the scores, the same ids in the same order. Column 0 is id 'b' "
            "there and 'a' in the scores.",
        ),
        (
            {"scores": torch.ones(2, 3), "ids": [0, 1]},
            "(ids)`: expected one id for each of the 3 values. Got 2.",
        ),
        (
            {"scores": labelled("a", "b", scores=torch.tensor([[0.0, torch.nan], [1.0, 1.0]]))},
            "(scores)`: expected finite numbers. 1 of 2 pool examples have NaN or infinite scores: id 'b'. "
            "Look at their loss, or leave them out.",
        ),
        (
            {"scores": labelled("a", "b", scores=torch.tensor([[0.0, 1.0], [torch.nan, torch.inf]]))},
            "(scores)`: expected finite numbers. 1 of 2 target examples have NaN or infinite scores: id 'q1'. "
            "Look at their loss, or leave them out.",
        ),
        (
            {"scores": torch.ones(2, 2), "curvature_scores": torch.tensor([[0.0, 1.0], [torch.nan, 1.0]])},
            "(curvature_scores)`: expected finite numbers. 1 of 2 pool examples have NaN or infinite "
            "curvature_scores: id 0. Look at their loss, or leave them out.",
        ),
        ({"scores": torch.ones(2, 2), "shares": torch.ones(3)}, f"(shares=[3])`: {SHARES}"),
        ({"scores": torch.ones(2, 2), "shares": torch.zeros(2)}, f"(shares=[2])`: {SHARES}"),
        ({"scores": torch.ones(2, 2), "shares": torch.tensor([1, torch.nan])}, f"(shares=[2])`: {SHARES}"),
        (
            {"scores": torch.ones(2, 2), "shares": torch.ones(2), "curvature_scores": torch.ones(3, 2)},
            f"(shares=[2])`: {SHARES}",
        ),
    ],
)
def test_bad_scores(arguments: dict[str, Any], message: str) -> None:
    with refused(f"`Interactions.from_scores{message}"):
        Interactions.from_scores(**arguments)
