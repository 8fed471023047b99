from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence import GroupEffects, InteractionGreedy
from lightning_influence.estimators.pair_factors import pair_factors
from lightning_influence.estimators.target_curvature import (
    TargetCurvature,
    TargetMatrix,
    TargetProduct,
    TargetRows,
)
from tests.curvature.models import normal
from tests.estimators.test_group_effects import CHANGES, GROUPS, problem

PAIRS = ("F+I", "F+B", "F+I+B")


@pytest.mark.parametrize("n", [3, 7, 12])
@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("kind", ["none", "matrix", "rows"])
def test_every_form_has_the_same_pairs(n: int, curved: bool, kind: str) -> None:
    """Three rows of five coordinates: pairs; seven: pairs beside vectors alone; twelve: never."""
    u, v, goals = normal(n, 5), normal(n, 5, seed=1), normal(4, 5, seed=2)
    fisher = goals.T @ goals / 4
    targets: dict[str, TargetCurvature | None] = {
        "none": None,
        "matrix": TargetMatrix(fisher),
        "rows": TargetRows(goals),
    }
    if kind == "none" and not curved:
        return
    features, metric = pair_factors(u, targets[kind], v if curved else None)
    expected: Tensor = torch.zeros(n, n).double() if kind == "none" else u @ fisher @ u.T
    if curved:
        expected = expected + v @ u.T + u @ v.T
    found = features @ features.T if metric is None else features @ metric @ features.T
    torch.testing.assert_close(found, expected)
    scores = kind == "rows" and not curved
    assert features.shape[1] == (4 if scores else min(n, 10 if curved else 5))


@given(seed=st.integers(0, 10**6), weight=st.sampled_from([1 / 12, 1.0]))
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", PAIRS)
def test_pairs_add_up_to_the_dense_formulas(method: Any, change: Any, seed: int, weight: float) -> None:
    """Groups of all examples, and of so few that pairs are the smaller form, for an H_f known in any way."""
    case = problem(seed, weight)
    fisher = case.target_gradients.T @ case.target_gradients / 4
    for target in (None, TargetRows(case.target_gradients), TargetProduct(lambda v: v @ fisher)):
        effects = case.effects(target)
        for ids, groups in ((range(12), GROUPS), (range(3), [[0], [2, 1], []])):
            found = effects.subset(ids).interactions(method)
            truth = [case.truth(group, method, change, None if target is None else fisher) for group in groups]
            torch.testing.assert_close(
                found.estimates(groups, change), torch.tensor(truth, dtype=torch.float64), rtol=1e-8, atol=1e-11
            )


def test_pairs_of_the_second_order_in_whitened_features() -> None:
    """With the empirical Fisher of the group K_ij = w (b_i + b_j) φ_iᵀφ_j, and it goes with the weight's square."""
    case = problem()
    features, goal = case.gradients, case.target_gradient
    effects = GroupEffects.from_gradients(features, goal, torch.eye(5), curvature_rows=features, weight=0.25)
    values = 0.25 * features @ goal
    found = effects.interactions("F+B")
    torch.testing.assert_close(found.values, values)
    expected = 0.25 * (values[:, None] + values) * (features @ features.T)
    torch.testing.assert_close(found.pairwise(range(12)), expected)
    torch.testing.assert_close(found.reweighted(0.5).pairwise(range(12)), 4 * expected)
    assert (found.target_curvature, found.weight) == ("none", 0.25)
    assert "H_S" in found.formula


@given(seed=st.integers(0, 10**6), budget=st.integers(1, 10))
@pytest.mark.parametrize("method", PAIRS[1:])
def test_greedy_picks_by_the_second_order_are_the_best_of_all_tried(method: Any, seed: int, budget: int) -> None:
    """Ten rows, every one tried at every pick by the dense formula; a permuted pool gives the same ids."""
    case, rows = problem(seed), range(10)
    chosen: list[int] = []
    for _ in range(budget):
        left = [row for row in rows if row not in chosen]
        chosen.append(min(left, key=lambda row: case.truth([*chosen, row], method, "addition")))
    effects = case.effects()
    for order in (list(rows), torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()):
        selection = effects.subset(order).interactions(method).select(InteractionGreedy(), budget)
        assert list(selection.ids) == chosen
        assert selection.objective == pytest.approx(case.truth(chosen, method, "addition"), abs=1e-10)


def test_a_newton_step_is_no_sum_over_pairs() -> None:
    with pytest.raises(ValueError, match=r"interactions\(method='N\+I'\)`: expected 'F\+I', 'F\+B' or 'F\+I\+B'"):
        problem().effects().interactions("N+I")  # type: ignore[arg-type]
    case = problem()
    without = GroupEffects.from_gradients(case.gradients, case.target_gradient, case.target_hessian)
    with pytest.raises(ValueError, match="needs the curvature of single examples"):
        without.interactions("F+B")
