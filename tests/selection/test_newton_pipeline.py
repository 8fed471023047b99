"""`Newton` from data, against `NewtonPool` by hand, and pools in another order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from lightning_influence import EKFAC, Identity, InfluenceFunction
from lightning_influence.capture import ExampleLoader
from lightning_influence.selection import Newton, NewtonGreedy, NewtonPool, held_out_ridge
from lightning_influence.selection.pipeline import _landmarks
from lightning_influence.selection.saturation import saturating_ridge
from tests.selection.test_pipeline import POOL, TARGETS, X, Y, selected, trained

GRADIENT = sum(parameter.numel() for parameter in trained(X, Y, steps=0).parameters())
FEW = Subset(TARGETS, [0, 1])  # which leave most of a gradient unseen


@pytest.fixture
def model() -> nn.Linear:
    """A warm-up of a few steps on the pool."""
    return trained(X, Y, steps=5)


@pytest.mark.parametrize("ridge", ["random", "saturate", 0.3])
@pytest.mark.parametrize("landmarks", [None, 0, 7, 0.25])
@pytest.mark.parametrize("screen", [None, True, False])
def test_settings_of_the_newton_step_arrive(model: nn.Linear, ridge: Any, landmarks: Any, screen: Any) -> None:
    influence = InfluenceFunction(model, Identity(), normalise=True).fit(POOL)
    number = {None: 120, 0.25: 30}.get(landmarks, landmarks)
    shrink = None if screen is None else not screen
    problem = NewtonPool.scored(influence, FEW, POOL, landmarks=number, seed=5)
    screens, shrinks = (ridge != "saturate" if word is None else word for word in (screen, shrink))
    problem = replace(problem, shrink=shrinks)
    pool = problem.screened(12) if screens else problem
    rule = NewtonGreedy(pool.ridge(12).nearly(0.95 if screens else 0.9) if isinstance(ridge, str) else ridge)
    if ridge == "saturate":
        rule = saturating_ridge(pool.interactions, pool.rule(12, rule), 12, 0.3)
    expected = pool.select(12, rule, screen=False)
    wanted = Newton(ridge, landmarks, screen, saturation=0.3, shrink=shrink)
    found = selected(model, 12, targets=FEW, rule=wanted, curvature=Identity(), seed=5)
    assert (found.ids, found.rule) == (expected.ids, expected.rule)
    assert found.screened == 120 - len(pool.features) == found.screened
    assert problem.select(12, wanted).to_dict() == found.to_dict()


@pytest.mark.parametrize(
    ("rows", "budget", "room"),
    [
        (120, 2**30, 120),  # all of the pool
        (3000, 2**30, 2048),
        (16, 15 * 8 * GRADIENT, 13),  # what fits beside the two targets
        (120, 8 * GRADIENT, 0),  # one at a time: each would be another pass
        (120, 8 * 120 * 12, 10),  # a table of 120 x 12 scores
        (120, 8 * 120, 0),
    ],
)
def test_landmarks_by_default_come_without_another_pass(rows: int, budget: int, room: int) -> None:
    influence = InfluenceFunction(trained(X, Y, steps=1), Identity(), memory_budget=budget)
    pool = ExampleLoader(torch.utils.data.TensorDataset(X.repeat(25, 1)[:rows], Y.repeat(25)[:rows]))
    assert _landmarks(Newton(), influence, ExampleLoader(FEW), pool) == room
    assert _landmarks(Newton(landmarks=0.5), influence, ExampleLoader(FEW), pool) == rows / 2
    assert _landmarks(NewtonGreedy(), influence, ExampleLoader(FEW), pool) == 0


ORDER = torch.randperm(120, generator=torch.Generator().manual_seed(4)).tolist()


@pytest.mark.parametrize("rule", [Newton(), Newton(landmarks=20), Newton("saturate", 0.5), NewtonGreedy()])
def test_another_order_of_the_same_ids_selects_the_same_rows(model: nn.Linear, rule: Any) -> None:
    """Landmarks, random selections and sampled labels are drawn by id."""
    found = selected(model, 12, targets=FEW, rule=rule)
    again = selected(model, 12, ExampleLoader(POOL, indices=ORDER), FEW, rule=rule)
    assert (again.ids, again.positions, again.screened, again.rule) == (
        found.ids,
        found.ids,
        found.screened,
        found.rule,
    )


@pytest.mark.parametrize("screen", [True, False])
def test_a_permuted_data_set_gives_the_permuted_selection_where_nothing_is_drawn(
    model: nn.Linear, screen: bool
) -> None:
    """With all rows as landmarks and a given ridge; fewer landmarks are other rows."""
    options: dict[str, Any] = {"rule": Newton(0.3, 1.0, screen), "curvature": EKFAC(fisher="empirical")}
    found = selected(model, 12, targets=FEW, **options)
    again = selected(model, 12, Subset(POOL, ORDER), FEW, **options)
    assert tuple(ORDER[k] for k in again.ids) == found.ids
    options["rule"] = Newton(0.3, 10, screen)
    other = selected(model, 12, Subset(POOL, ORDER), FEW, **options)
    assert tuple(ORDER[k] for k in other.ids) != selected(model, 12, targets=FEW, **options).ids


def test_targets_and_landmarks_are_scored_in_one_pass(model: nn.Linear) -> None:
    influence = InfluenceFunction(model, Identity()).fit(POOL)
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    NewtonPool.scored(influence, TARGETS, POOL, landmarks=30)
    handle.remove()
    assert sum(seen) == 120 + 40 + 30 + 2 * 40  # pool, targets and landmarks once; targets for each other


@pytest.mark.parametrize("target_curvature", ["empirical", "sampled"])
@pytest.mark.parametrize("screen", [None, False])
def test_the_ridge_by_held_out_targets(model: nn.Linear, target_curvature: Any, screen: bool | None) -> None:
    influence = InfluenceFunction(model, Identity(), normalise=True).fit(POOL)
    told = {"target_curvature": target_curvature, "seed": 5}
    problem = replace(NewtonPool.scored(influence, TARGETS, POOL, landmarks=9, **told), shrink=True)
    choice = held_out_ridge(problem, 12, folds=4, screen=screen is not False)
    expected = problem.select(12, NewtonGreedy(choice.best), screen=screen)
    rule = Newton("held-out", 9, screen, folds=4)
    found = selected(model, 12, rule=rule, curvature=Identity(), **told)
    assert (found.ids, found.rule, found.screened) == (expected.ids, expected.rule, expected.screened)
    assert found.held_out.to_dict() == choice.to_dict()
    assert selected(model, 12, rule=Newton("random", 9), curvature=Identity(), **told).held_out is None
