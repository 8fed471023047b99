"""Several target sets of different sizes, against the scores put together by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence.curvature import Identity
from lightning_influence.estimators import InfluenceFunction
from lightning_influence.selection import (
    InteractionGreedy,
    Newton,
    NewtonGreedy,
    NewtonPool,
    RoundRobin,
    TopK,
    held_out_weight,
    select_by_scores,
)
from lightning_influence.selection.aggregate import target_interactions
from lightning_influence.selection.named_targets import NamedTargets
from lightning_influence.selection.pipeline import choose, select_training_data


def data(n, seed):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(1))


POOL, MATHS, LAW = data(30, 0), data(2, 1), data(7, 2)
NAMED = {"maths": MATHS, "law": LAW}
SETS = {"maths": range(2), "law": range(2, 9)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def choice(model, targets, **options):
    settings = {"budget": 6, "curvature": Identity(), "progress": False}
    return select_training_data(model, POOL, targets, **{**settings, **options})


@pytest.fixture
def scores(model):
    together = TensorDataset(*(torch.cat(parts) for parts in zip(MATHS.tensors, LAW.tensors, strict=True)))
    return InfluenceFunction(model, Identity(), normalise=True, progress=False).score(together, POOL)


@pytest.mark.parametrize("weights", [None, {"maths": 3.0}, {"law": -0.5}])
def test_weighted_means_by_hand(model, scores, weights):
    factor = {"maths": 1.0, "law": 1.0, **(weights or {})}
    total = scores.total().double()
    by_hand = (factor["maths"] * total[:2].mean(0) + factor["law"] * total[2:].mean(0)) / 2
    top = choice(model, NAMED, rule=TopK(), target_weights=weights)
    assert sorted(top.ids) == sorted(by_hand.topk(6).indices.tolist())
    torch.testing.assert_close(top.first_order, -by_hand[list(top.ids)] / 6, rtol=1e-4, atol=1e-7)


def test_interactions_of_all_sets(model, scores):
    found = choice(model, NAMED, target_weights={"maths": 2.0}, weight="1/k")
    problem = target_interactions(scores, SETS, {"maths": 2.0}, weight=1 / 6)
    expected = choose(problem, InteractionGreedy(), 6, "1/k")
    assert found.ids == expected.ids
    torch.testing.assert_close(found.gains, expected.gains, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("across", ["max", "min"])
def test_largest_and_smallest(model, scores, across):
    found = choice(model, NAMED, rule=TopK(), across=across, target_weights={"law": 2.0})
    expected = select_by_scores(scores, budget=6, across=across, targets=SETS, weights={"law": 2.0})
    assert found.ids == expected.ids
    torch.testing.assert_close(found.gains, expected.gains / 6, rtol=1e-4, atol=1e-7)


def test_taking_turns(model, scores):
    found = choice(model, NAMED, rule=TopK(), across="round-robin")
    means = torch.stack([scores.total()[list(members)].mean(0) for members in SETS.values()])
    turns = RoundRobin(means).select(means.mean(0), budget=6)
    assert found.ids == turns.ids
    assert {found.ids[0], found.ids[1]} == {int(means[0].argmax()), int(means[1].argmax())}
    torch.testing.assert_close(found.gains, turns.gains / 6, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weights", [{}, {"maths": 3.0}, {"law": -0.5}])
def test_the_newton_step_for_all_sets(model, scores, weights):
    shares = NamedTargets("f", NAMED, weights).shares
    influence = InfluenceFunction(model, Identity(), normalise=True, progress=False).fit(POOL)
    problem = NewtonPool.scored(influence, NamedTargets("f", NAMED).data, POOL, landmarks=30, shares=shares)
    expected = target_interactions(scores, SETS, weights, weight=1.0)
    torch.testing.assert_close(problem.interactions.values, expected.values.double(), rtol=1e-4, atol=1e-6)
    pairs = (part.pairwise(range(30)) for part in (problem.interactions, expected))
    torch.testing.assert_close(*pairs, rtol=1e-3, atol=1e-5)
    found = choice(model, NAMED, target_weights=weights)
    assert found.ids == problem.select(6).ids
    assert choice(model, NAMED, target_weights=weights, rule=NewtonGreedy(2.0)).rule == "NewtonGreedy(ridge=2.0)"


@pytest.mark.parametrize("weights", [{"maths": 2.0}, {"law": -0.5}])
def test_parts_of_all_sets_are_held_out(model, scores, weights):
    shares = NamedTargets("f", NAMED, weights).shares
    found = choice(model, NAMED, target_weights=weights, weight="held-out", folds=3)
    by_hand = held_out_weight(scores, 6, shares=shares, folds=3)
    torch.testing.assert_close(found.held_out.explained, by_hand.explained, rtol=1e-4, atol=1e-6)
    problem = target_interactions(scores, SETS, weights, weight=by_hand.best)
    assert (found.ids, found.weight) == (problem.select(InteractionGreedy(), 6).ids, pytest.approx(by_hand.best))


def test_sets_without_a_weight_are_not_held_out(model):
    assert NamedTargets("f", LAW).counted == 7
    assert NamedTargets("f", NAMED).counted == 9
    named = {"target_weights": {"law": 0}}
    assert NamedTargets("f", NAMED, named["target_weights"]).counted == 2
    assert choice(model, NAMED, **named, rule=Newton("held-out", folds=2)).held_out.best > 0
    assert choice(model, NAMED, **named, weight="held-out", folds=2).held_out.best > 0
    for options in ({"rule": Newton("held-out", folds=3)}, {"weight": "held-out", "folds": 3}):
        with pytest.raises(ValueError, match="expected an int from 2 to the number of targets, 2, of which"):
            choice(model, NAMED, **named, **options)


def test_one_named_set_is_the_set(model):
    one, plain = choice(model, {"law": LAW}), choice(model, LAW)
    assert one.ids == plain.ids
    torch.testing.assert_close(one.gains, plain.gains, rtol=1e-5, atol=1e-8)


def test_rows_one_set_after_another():
    named = NamedTargets("f", {"maths": DataLoader(MATHS, batch_size=4), "law": DataLoader(LAW, batch_size=3)})
    assert (named.sets, named.data.ids, named.data.batch_size) == (SETS, list(range(9)), 3)
    assert torch.equal(named.data.dataset[4][0], LAW[2][0])


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ({}, {}, r"targets=\{\}\)`: expected at least one target set by name"),
        (LAW, {"target_weights": {"law": 1.0}}, "target_weights and across are for several target sets"),
        (LAW, {"across": "max"}, "target_weights and across are for several target sets"),
        (NAMED, {"across": "median"}, r"expected one of \['mean', 'max', 'min', 'round-robin'\]"),
        (NAMED, {"across": "round-robin", "target_weights": {"law": 2.0}}, "every target set takes its turn"),
        (NAMED, {"across": "round-robin"}, r"has no interactions. Expected rule=TopK\(\)"),
        (NAMED, {"target_weights": {"law": "much"}}, "expected finite numbers that are not all 0"),
        (NAMED, {"target_weights": {"low": 1.0}}, r"\['low'\] are no targets; expected names among \['maths', 'law'\]"),
        (NAMED, {"target_weights": {"law": float("nan")}}, "expected finite numbers that are not all 0"),
        (NAMED, {"across": "max"}, r"has no interactions. Expected rule=TopK\(\)"),
        ({"a": DataLoader(LAW, collate_fn=list), "b": LAW}, {}, "have different collate functions"),
        (
            NAMED,
            {"target_weights": {"maths": 0, "law": 0}, "rule": TopK()},
            "expected finite numbers that are not all 0",
        ),
    ],
)
def test_refused(monkeypatch, model, targets, options, message):
    monkeypatch.setattr(InfluenceFunction, "check", lambda *_, **__: pytest.fail("the model has run"))
    with pytest.raises(ValueError, match=message):
        choice(model, targets, **options)
