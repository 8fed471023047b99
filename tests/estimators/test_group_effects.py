from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence import GroupEffects, InteractionGreedy, TargetMatrix, TargetProduct, TargetRows
from lightning_influence.estimators.group_effects import METHODS
from tests import oracles
from tests.estimators.retraining import digits, neighbours, retrained_changes, spearman

CHANGES = ("removal", "addition")
GROUPS = [[0], [3, 1], [7, 2, 5, 0, 11], list(range(12)), []]


@dataclass(frozen=True)
class Problem:
    """n = 12 examples with s = 2 curvature rows each, r = 5 coordinates, and a target; all dense, from no model."""

    gradients: Tensor
    rows: Tensor
    hessian: Tensor
    target_gradients: Tensor
    target_hessian: Tensor
    weight: float

    @property
    def target_gradient(self) -> Tensor:
        return self.target_gradients.mean(0)

    def truth(self, group: list[int], method: str, change: str, target_hessian: Tensor | None = None) -> float:
        own = torch.stack([part.T @ part for part in self.rows])
        curved = self.target_hessian if target_hessian is None else target_hessian
        pieces = (self.gradients, self.hessian, own, self.target_gradient, curved)
        return oracles.group_estimate(*pieces, group, method, change, self.weight)

    def effects(self, target: Any = None, **options: Any) -> GroupEffects:
        target = self.target_hessian if target is None else target
        arguments = (self.gradients, self.target_gradient, target, self.hessian, self.rows)
        return GroupEffects.from_gradients(*arguments, weight=self.weight, **options)


def problem(seed: int = 0, weight: float = 1 / 12) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, root, half = normal(12, 2, 5), normal(5, 5), normal(5, 5)
    whole = weight * torch.einsum("nsr,nsq->rq", rows, rows)  # so that even the whole pool can be removed
    hessian = whole + root @ root.T + 0.5 * torch.eye(5, dtype=torch.float64)
    return Problem(normal(12, 5), rows, hessian, normal(4, 5), half + half.T, weight)


@given(seed=st.integers(0, 10**6), weight=st.sampled_from([1 / 12, 1 / 3, 1.0]))
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_equals_dense_formulas(method: Any, change: Any, seed: int, weight: float) -> None:
    case = problem(seed, weight)
    found = case.effects().estimates(GROUPS, method, change)
    truth = [case.truth(group, method, change) for group in GROUPS]
    torch.testing.assert_close(found, torch.tensor(truth, dtype=torch.float64), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("change", CHANGES)
def test_whitened_features_give_the_same(change: Any) -> None:
    """With φ = H^(-1/2) g for all vectors and H_f turned alike, H is the identity."""
    case = problem()
    values, basis = torch.linalg.eigh(case.hessian)
    root = basis @ torch.diag(values.rsqrt()) @ basis.T
    target = root @ case.target_hessian @ root
    features = (case.gradients @ root, case.target_gradient @ root, target)
    found = GroupEffects.from_gradients(*features, curvature_rows=case.rows @ root)
    for method, values in case.effects().table(GROUPS, change=change).items():
        torch.testing.assert_close(found.estimates(GROUPS, method, change), values)


@pytest.mark.parametrize("method", METHODS)
def test_the_target_curvature_may_be_known_in_three_ways(method: Any) -> None:
    case = problem()
    fisher = case.target_gradients.T @ case.target_gradients / 4
    ways = (TargetMatrix(fisher), TargetRows(case.target_gradients), TargetProduct(lambda v: v @ fisher))
    for way in ways:
        found = case.effects(way)
        for group in GROUPS:
            expected = case.truth(group, method, "removal", fisher)
            assert found.estimate(group, method) == pytest.approx(expected, abs=1e-12)
        # also when everything depends on few pairs, or on many
        for few in (range(3), range(12)):
            K = found.subset(few).interactions().pairwise(few)
            shifts = case.weight * case.gradients[few.start : few.stop] @ torch.linalg.inv(case.hessian)
            torch.testing.assert_close(K, shifts @ fisher @ shifts.T)


def test_removal_and_addition_differ_in_sign_where_the_order_is_odd() -> None:
    effects = problem().effects()
    removal, addition = effects.table(GROUPS), effects.table(GROUPS, change="addition")
    torch.testing.assert_close(removal["F"], -addition["F"])
    torch.testing.assert_close(removal["F+I"] - removal["F"], addition["F+I"] - addition["F"])
    torch.testing.assert_close(removal["F+B"] - removal["F"], addition["F+B"] - addition["F"])
    both = removal["F+I"] + removal["F+B"] - removal["F"]
    torch.testing.assert_close(removal["F+I+B"], both)


def test_small_weights_make_the_newton_step_the_second_order() -> None:
    """N = F + B + O(w³): with a tenth of the weight the difference is a thousandth."""
    differences = []
    for weight in (1e-3, 1e-4):
        case = problem(weight=1e-3)
        effects = GroupEffects.from_gradients(
            case.gradients, case.target_gradient, case.target_hessian, case.hessian, case.rows, weight=weight
        )
        for change in CHANGES:
            table = effects.table(GROUPS[:3], change=change)
            differences.append((table["N"] - table["F+B"]).abs())
    for k in range(2):
        torch.testing.assert_close(
            differences[2 + k] / differences[k], torch.full((3,), 1e-3).double(), rtol=0.1, atol=0
        )


def test_one_example_is_the_rescaled_influence_function() -> None:
    """Where g = c ĝ, the step is u/(1 − w ĝᵀH⁻¹ĝ) for removal and u/(1 + ...) for addition."""
    case = problem()
    rows = case.rows[:, 0]
    scale = torch.linspace(-2, 2, 12).double()[:, None]
    hessian = torch.eye(5).double() + rows.T @ rows / 12
    effects = GroupEffects.from_gradients(scale * rows, case.target_gradient, case.target_hessian, hessian, rows)
    leverage = (rows @ torch.linalg.inv(hessian) * rows).sum(1) / 12
    singles = [[k] for k in range(12)]
    for change, sign in (("removal", -1), ("addition", 1)):
        closed = effects.estimates(singles, "F", change) / (1 + sign * leverage)
        torch.testing.assert_close(effects.estimates(singles, "N", change), closed)
        shifts = torch.stack([effects.shift(k, "N", change) for k in singles])
        squares = (shifts @ case.target_hessian * shifts).sum(1)
        torch.testing.assert_close(effects.estimates(singles, "N+I", change), closed + squares / 2)


@pytest.mark.parametrize("change", CHANGES)
def test_linear_regression_is_retrained_exactly(change: Any) -> None:
    """Squared loss: N is ∇fᵀ(θ' − θ) and N+I the very change of a squared target loss, for any group."""
    generator = torch.Generator().manual_seed(0)
    x, target_x = (torch.randn(k, 4, generator=generator, dtype=torch.float64) for k in (20, 7))
    y, target_y = (torch.randn(k, generator=generator, dtype=torch.float64) for k in (20, 7))
    decay, n = 0.05, 20

    def fitted(counts: Tensor) -> Tensor:
        weighted = x.T * counts / n
        return torch.linalg.solve(weighted @ x + decay * torch.eye(4, dtype=torch.float64), weighted @ y)

    theta = fitted(torch.ones(n).double())
    hessian = x.T @ x / n + decay * torch.eye(4, dtype=torch.float64)
    target_gradient = (target_x.T @ (target_x @ theta - target_y)) / 7
    effects = GroupEffects.from_gradients(
        (x @ theta - y)[:, None] * x, target_gradient, target_x.T @ target_x / 7, hessian, x
    )

    def target_loss(parameters: Tensor) -> Tensor:
        return 0.5 * (target_x @ parameters - target_y).square().mean()

    for group in ([4], [1, 5, 7], list(range(0, 20, 2)), list(range(20))):
        counts = torch.ones(n).double()
        counts[group] += -1 if change == "removal" else 1
        again = fitted(counts)
        assert effects.estimate(group, "N", change) == pytest.approx(
            float(target_gradient @ (again - theta)), abs=1e-10
        )
        assert effects.estimate(group, "N+I", change) == pytest.approx(
            float(target_loss(again) - target_loss(theta)), abs=1e-10
        )
        torch.testing.assert_close(effects.shift(group, "N", change), again - theta, rtol=0, atol=1e-10)


def on_digits(decay: float) -> tuple[Tensor, GroupEffects]:
    """Softmax regression at its minimum, with exact H, H_f and rows whose outer products are the H_i."""
    inputs, labels, target, target_labels = digits()
    theta = oracles.fit_softmax(inputs, labels, 3, decay)
    p = oracles.softmax_probabilities(inputs, theta)
    centred = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]  # columns c: √p_c (e_c − p)
    rows = torch.einsum("nac,nd->ncad", centred, inputs).flatten(2)
    effects = GroupEffects.from_gradients(
        oracles.softmax_gradients(inputs, labels, theta),
        oracles.softmax_gradients(target, target_labels, theta).mean(0),
        oracles.softmax_hessian(target, theta, 0.0),
        oracles.softmax_hessian(inputs, theta, decay),
        rows,
    )
    return theta, effects


@pytest.mark.parametrize(("size", "decay"), [(15, 0.01), (30, 0.01)])
def test_estimates_against_leaving_groups_out(size: int, decay: float) -> None:
    """40 groups of nearest neighbours in softmax space left out of a convex model's training set."""
    inputs, labels, target, target_labels = digits()
    theta, effects = on_digits(decay)
    groups = neighbours(inputs, theta, size)
    truth = retrained_changes(inputs, labels, target, target_labels, theta, groups, decay)
    table = effects.table(groups)
    errors = {method: float((values - truth).abs().mean()) for method, values in table.items()}
    agreement = {method: spearman(values, truth) for method, values in table.items()}
    assert errors["N+I"] < errors["F+I"] < errors["F"]
    assert agreement["N+I"] > agreement["F+I"] > agreement["F"]
    assert errors["N+I"] == min(errors.values())
    assert agreement["N+I"] == max(agreement.values()) > 0.98


def test_proposition_one_with_several_classes() -> None:
    """K_ij = (1/n²)(p_i − e_{y_i})ᵀ [J_iᵀ M J_j] (p_j − e_{y_j}), and its class means by hand."""
    inputs, labels, target, _ = digits(n=60)
    theta = oracles.fit_softmax(inputs, labels, 3, 0.01)
    metric = oracles.softmax_hessian(target, theta, 0.0)
    gradients = oracles.softmax_gradients(inputs, labels, theta)
    hessian = oracles.softmax_hessian(inputs, theta, 0.01)
    effects = GroupEffects.from_gradients(gradients, gradients[0], metric, hessian)
    inverse = torch.linalg.inv(hessian)
    errors = oracles.softmax_probabilities(inputs, theta) - torch.nn.functional.one_hot(labels, 3)
    logits = torch.einsum("ab,nd->nabd", torch.eye(3).double(), inputs).flatten(2)  # J_iᵀ, [n, 3, 3 d]
    K = torch.einsum("na,nap,pq,mbq,mb->nm", errors, logits, inverse @ metric @ inverse, logits, errors) / 60**2
    interactions = effects.interactions()
    torch.testing.assert_close(interactions.pairwise(range(60)), K, rtol=1e-8, atol=1e-14)
    view = interactions.mean_interactions(labels)
    for a in range(3):
        for b in range(3):
            pairs = [(i, j) for i in range(60) for j in range(60) if i != j and (labels[i], labels[j]) == (a, b)]
            assert float(view.values[a, b]) == pytest.approx(float(torch.stack([K[p] for p in pairs]).mean()), rel=1e-8)


@given(seed=st.integers(0, 10**6))
def test_order_does_not_matter(seed: int) -> None:
    case = problem(seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    shuffled = GroupEffects.from_gradients(
        case.gradients[order],
        case.target_gradient,
        case.target_hessian,
        case.hessian,
        case.rows[order].flip(1),
        ids=order.tolist(),
        weight=case.weight,
    )
    for method, values in case.effects().table(GROUPS).items():
        torch.testing.assert_close(shuffled.estimates([group[::-1] for group in GROUPS], method), values)


def test_many_rows_are_compressed() -> None:
    """Ten draws for each of twelve examples in five coordinates: the same H_S as from its five eigenvectors."""
    case = problem()
    rows = torch.randn(12, 10, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 4
    many = Problem(
        case.gradients,
        rows,
        case.hessian + 5 * torch.eye(5, dtype=torch.float64),
        case.target_gradients,
        case.target_hessian,
        1 / 12,
    )
    for change in CHANGES:
        for group in GROUPS:
            found = many.effects().estimate(group, "N+I", change)
            assert found == pytest.approx(many.truth(group, "N+I", change), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_taken_in_float64(dtype: torch.dtype) -> None:
    n = 3000
    gradients = torch.full((n, 2), 0.1).to(dtype)
    effects = GroupEffects.from_gradients(gradients, torch.ones(2), torch.eye(2), weight=1.0)
    assert effects.estimate(range(n), "F") == pytest.approx(n * 2 * float(gradients[0, 0]), rel=1e-12)


def test_a_selection_minimises_the_addition_estimate() -> None:
    effects = problem().effects(ids=[f"{k:02}" for k in range(12)])
    interactions = effects.interactions()
    selection = interactions.select(InteractionGreedy(), 4)
    assert selection.objective == pytest.approx(effects.estimate(selection.ids, "F+I", "addition"), abs=1e-12)
    assert interactions.weight == effects.weight


def test_subsets_keep_the_weight() -> None:
    effects = problem().effects(ids=[f"row {k}" for k in range(12)])
    part = effects.subset(["row 7", "row 2"])
    assert part.ids == ("row 7", "row 2")
    for method in METHODS:
        assert part.estimate(["row 2", "row 7"], method) == pytest.approx(effects.estimate(["row 2", "row 7"], method))
    assert effects.subset(effects.ids) is effects


# Bad input


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


def test_too_little_damping_for_a_removal() -> None:
    """The group and a damping that suffices are named; with it the removal is possible."""
    case = problem()
    weak = Problem(
        case.gradients, case.rows, 0.3 * torch.eye(5).double(), case.target_gradients, case.target_hessian, 1.0
    )
    effects = weak.effects()
    assert effects.estimates([[3, 1]], "N", "addition").isfinite().all()
    assert effects.estimates([[3, 1]], "F+I+B").isfinite().all()
    with refused("`GroupEffects`: removing the group of ids 3, 1 (2 in all) takes away more curvature than") as caught:
        effects.estimates([[], [3, 1]], "N+I")
    extra = float(re.search(r"Add more than (\S+) to the damping", str(caught.value)).group(1))  # type: ignore[union-attr]
    rows = case.rows[[3, 1]].flatten(0, 1)
    lacking = -float(torch.linalg.eigvalsh(weak.hessian - rows.T @ rows)[0])
    assert 0 < lacking <= 1.001 * extra < 3 * lacking
    damped = weak.hessian + 1.01 * extra * torch.eye(5, dtype=torch.float64)
    again = GroupEffects.from_gradients(
        case.gradients, case.target_gradient, case.target_hessian, damped, case.rows, weight=1.0
    )
    assert again.estimates([[3, 1]], "N").isfinite().all()


def test_bad_questions() -> None:
    effects = problem().effects()
    with refused("`GroupEffects`: expected a group of the 12 examples it was made of. Unknown: ids 12, '3'."):
        effects.estimate([0, 12, "3"])
    with refused("`GroupEffects`: expected each example of a group once. Repeated: id 3."):
        effects.estimate([3, 1, 3])
    for single in (3, "3", torch.tensor(3)):
        with refused("`GroupEffects`: expected the ids of each group in a list, as [[3, 4]]. Got "):
            effects.estimates([single])
    with refused("`GroupEffects.estimates(method='X')`: expected one of 'F', 'F+I', 'F+B', 'F+I+B', 'N', 'N+I'."):
        effects.estimate([0], "X")
    with refused("`GroupEffects.estimates(change='remove')`: expected 'removal' or 'addition'."):
        effects.estimate([0], change="remove")


@pytest.mark.parametrize("method", ["F+B", "F+I+B", "N", "N+I"])
def test_methods_that_need_the_curvature_of_the_group(method: Any) -> None:
    case = problem()
    effects = GroupEffects.from_gradients(case.gradients, case.target_gradient, case.target_hessian, case.hessian)
    assert effects.estimate([0], "F+I") == pytest.approx(case.truth([0], "F+I", "removal"))
    with refused(f"`GroupEffects.estimates(method='{method}')`: needs the curvature of single examples."):
        effects.estimate([0], method)


def nan_at(tensor: Tensor, row: int) -> Tensor:
    changed = tensor.clone()
    changed[row] = torch.nan
    return changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shifts": torch.ones(12)}, "(shifts)`: expected a real tensor [n, r], n and r >= 1. Got shape [12]."),
        ({"target_gradient": torch.ones(4)}, "(target_gradient)`: expected [r] with r = 5. Got shape [4]."),
        ({"target_gradient": torch.full((5,), torch.inf)}, "(target_gradient)`: expected finite numbers."),
        ({"curvature_rows": None}, "`: expected both curvature_rows and curvature_shifts, or neither."),
        (
            {"curvature_rows": torch.ones(12, 1, 5)},
            "(curvature_rows, curvature_shifts)`: expected two tensors [n, s, r] with n, r = (12, 5). Got shapes "
            "[12, 1, 5] and [12, 2, 5].",
        ),
        ({"ids": range(11)}, "(ids)`: expected one id for each of the 12 values. Got 11."),
        ({"ids": [0] * 12}, "(ids)`: expected unique ids. More than once: id 0."),
        ({"weight": 0.0}, "(weight=0.0)`: expected a number > 0"),
        ({"shifts": nan_at(torch.ones(12, 5), 7)}, "(shifts)`: expected finite numbers. 1 of 12 examples have NaN"),
        (
            {"curvature_rows": nan_at(torch.ones(12, 2, 5), 3)},
            "(curvature_rows)`: expected finite numbers. 1 of 12 examples have NaN or infinite curvature_rows: id 3.",
        ),
    ],
)
def test_bad_parts(changes: dict[str, Any], message: str) -> None:
    effects = problem().effects()
    fields = ("shifts", "target_gradient", "target_curvature", "curvature_rows", "curvature_shifts", "ids", "weight")
    with refused(f"`GroupEffects{message}"):
        GroupEffects(**{**{field: getattr(effects, field) for field in fields}, **changes})


def test_a_hessian_that_is_not_positive_definite() -> None:
    case = problem()
    with refused("`GroupEffects.from_gradients(hessian)`: expected a positive definite matrix [r, r]. Add damping"):
        GroupEffects.from_gradients(case.gradients, case.target_gradient, case.target_hessian, -case.hessian)
