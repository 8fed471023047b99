from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.estimators.interactions import Interactions
from lightning_influence.selection import InteractionGreedy, NewtonGreedy, TopK
from lightning_influence.selection.saturation import (
    gain_curve,
    saturating_ridge,
    saturating_weight,
    select_at_saturation,
)

RULE = InteractionGreedy()


def alike(n: int, r: int = 8, seed: int = 0, unlike: float = 0.7, helpful: float = 1.0) -> Interactions:
    """A pool as influence scores give it: m target gradients near each other, rows along and across them."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(r, generator=generator).double()
    targets = target + unlike * torch.randn(5, r, generator=generator).double()
    rows = helpful * target + unlike * target.norm() * torch.randn(n, r, generator=generator).double() / math.sqrt(r)
    return Interactions.from_scores(targets @ rows.T, 1 / n)


def share(interactions: Interactions, weight: float, budget: int) -> float:
    """Gain of the last twentieth of the picks over that of the first."""
    gains = interactions.reweighted(weight).select(RULE, budget).gains
    edge = max(1, budget // 20)
    return float(gains[-edge:].mean() / gains[:edge].mean())


def own_optimum(interactions: Interactions, rows: Tensor) -> float:
    """Median of the weights at which the rows, each alone, lower the target most: b / K at weight 1."""
    at_one = interactions.reweighted(1.0)
    ratios = [float(at_one.values[j] / at_one.features[j].square().sum()) for j in rows.tolist()]
    return float(torch.tensor(ratios, dtype=torch.float64).median())


@given(st.integers(20, 60), st.integers(0, 20), st.data())
def test_the_last_picks_still_gain_and_hardly_longer(n: int, seed: int, data: st.DataObject) -> None:
    interactions = alike(n, seed=seed)
    budget = data.draw(st.integers(2, n // 3))
    weight = saturating_weight(interactions, RULE, budget)
    best = interactions.values.argsort(descending=True)[:budget]
    limit = own_optimum(interactions, best)
    assert share(interactions, weight, budget) >= 0.05
    assert weight <= limit * (1 + 1e-9)
    if weight < limit * (1 - 1e-9):
        assert share(interactions, 1.03 * weight, budget) < 0.1


@pytest.mark.parametrize("budget", [40, 80, 150])
def test_at_four_times_the_weight_the_last_picks_gain_nothing(budget: int) -> None:
    interactions = alike(500)
    weight = saturating_weight(interactions, RULE, budget)
    assert share(interactions, weight, budget) >= 0.05
    assert share(interactions, 4 * weight, budget) < 0.05
    larger = saturating_weight(interactions, RULE, budget, saturation=0.01)
    assert larger >= weight
    assert share(interactions, larger, budget) >= 0.01


@given(st.integers(0, 20), st.integers(-30, 30))
def test_the_scale_of_the_scores_does_not_matter(seed: int, exponent: int) -> None:
    interactions, scale = alike(40, seed=seed), 2.0**exponent  # a power of two, so that rounding stays the same
    scaled = Interactions(scale * interactions.values, scale * interactions.features, ids=range(40), weight=1 / 40)
    one, weight = select_at_saturation(interactions, RULE, 10)
    other, smaller = select_at_saturation(scaled, RULE, 10)
    assert other.ids == one.ids
    assert smaller == pytest.approx(weight / scale, rel=1e-12)


@given(st.integers(0, 20), st.floats(1e-6, 1e6))
def test_the_weight_that_is_contained_does_not_matter(seed: int, given_weight: float) -> None:
    interactions = alike(40, seed=seed)
    found = saturating_weight(interactions.reweighted(given_weight), RULE, 10)
    assert found == pytest.approx(saturating_weight(interactions, RULE, 10), rel=1e-6)


def test_select_at_saturation_is_the_rule_at_that_weight() -> None:
    interactions = alike(60)
    selection, weight = select_at_saturation(interactions, RULE, 12)
    assert weight == saturating_weight(interactions, RULE, 12)
    assert selection.ids == interactions.reweighted(weight).select(RULE, 12).ids


def test_a_single_row_goes_to_its_own_optimum() -> None:
    interactions = alike(50)
    selection, weight = select_at_saturation(interactions, RULE, 1)
    assert weight == pytest.approx(own_optimum(interactions, interactions.values.argmax()[None]))
    half = 0.5 * weight / interactions.weight * float(interactions.values.max())
    assert selection.objective <= -half * (1 - 1e-9)


def test_rows_that_do_nothing_are_not_what_gains() -> None:
    """A row a thousand times smaller can bear a thousand times the weight; that is no reason to give it."""
    normal = alike(40)
    features = torch.cat([normal.features, 1e-3 * normal.features])
    values = torch.cat([normal.values, 1e-3 * normal.values])
    both = Interactions(values, features, ids=range(80), weight=1 / 80)
    selection, weight = select_at_saturation(both, RULE, 5)
    assert weight <= own_optimum(normal, normal.values.argsort(descending=True)[:5]) * (1 + 1e-9)
    assert all(name < 40 for name in selection.ids)


@pytest.mark.parametrize("helpful", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("share_of_pool", [0.5, 0.9, 1.0])
def test_a_budget_that_reaches_far_into_the_pool(helpful: float, share_of_pool: float) -> None:
    """The last picks gain nothing at any weight; it is found where the rows that could gain are used up."""
    interactions = alike(100, helpful=helpful)
    budget = int(share_of_pool * 100)
    selection, weight = select_at_saturation(interactions, RULE, budget)
    assert len(selection) == budget
    ordered = interactions.values.sort(descending=True).values
    counted = int((ordered >= 0.0975 * ordered[0]).sum())
    assert share(interactions, weight, min(budget, counted)) >= 0.05
    assert weight > 0.01 * own_optimum(interactions, interactions.values.argsort(descending=True)[:counted]) / counted


def test_without_interactions_nothing_saturates() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.5])
    interactions = Interactions(values, torch.zeros(4, 1), ids=range(4), weight=0.25)
    assert saturating_weight(interactions, RULE, 3) == 0.25
    assert select_at_saturation(interactions, RULE, 3)[0].ids == (0, 1, 2)


def test_an_indefinite_metric() -> None:
    """A target whose Hessian is not definite: some rows only gain from being together."""
    interactions = alike(60)
    metric = torch.diag(torch.tensor([1.0, -0.5, 1.0, 0.2, 1.0]).double())
    bent = Interactions(interactions.values, interactions.features, metric, ids=range(60), weight=1 / 60)
    weight = saturating_weight(bent, RULE, 15)
    assert 0 < weight < math.inf


def test_additive_rules_always_last() -> None:
    interactions = alike(60)
    weight = saturating_weight(interactions, TopK(), 10)
    assert math.isfinite(weight)


@pytest.mark.parametrize("values", [[-1.0, -2.0], [0.0, -1.0]])
def test_a_pool_that_does_not_help(values: list[float]) -> None:
    interactions = Interactions(torch.tensor(values), torch.ones(2, 1), ids=range(2), weight=0.5)
    with pytest.raises(ValueError, match=r"no row of the pool is predicted to lower the target loss on its own\."):
        saturating_weight(interactions, RULE, 1)


@pytest.mark.parametrize("saturation", [0, 1, -0.1, float("nan")])
def test_saturation_is_a_share(saturation: float) -> None:
    message = r"`saturating_weight\(saturation=.*\)`: expected a share in \(0, 1\), such as 0.05"
    with pytest.raises(ValueError, match=message):
        saturating_weight(alike(20), RULE, 3, saturation)


@pytest.mark.parametrize("saturation", [0.3, 0.6, 0.99])
def test_a_large_saturation_counts_fewer_picks(saturation: float) -> None:
    interactions = alike(60)
    weight = saturating_weight(interactions, RULE, 20, saturation)
    ordered = interactions.values.sort(descending=True).values[:20]
    fading = 1 - (1 - saturation) ** 2
    counted = 20 if ordered[-1] >= fading * ordered[0] else int((ordered >= fading * ordered[0]).sum())
    assert share(interactions, weight, counted) >= saturation


# -- the ridge of a Newton step


def whitened(n: int, r: int = 8, seed: int = 0, unlike: float = 0.3) -> Interactions:
    """Whitened gradients of length 1: five targets near each other, rows along and across them."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.nn.functional.normalize(torch.randn(r, generator=generator).double(), dim=0)
    parts = (torch.randn(m, r, generator=generator).double() / math.sqrt(r) for m in (5, n))
    goals, rows = (torch.nn.functional.normalize(part, dim=1) for part in parts)
    rows = torch.nn.functional.normalize(rows + target * torch.rand(n, 1, generator=generator), dim=1)
    return Interactions.from_features(rows, torch.nn.functional.normalize(target + unlike * goals, dim=1))


def last(interactions: Interactions, rule: NewtonGreedy, budget: int) -> float:
    gains, edge = interactions.select(rule, budget).gains, max(1, budget // 20)
    return float(gains[-edge:].mean() / gains[:edge].mean())


@given(st.integers(30, 60), st.integers(0, 20), st.sampled_from([0.05, 0.2]), st.data())
def test_the_smallest_ridge_at_which_the_last_picks_gain(
    n: int, seed: int, saturation: float, data: st.DataObject
) -> None:
    interactions = whitened(n, seed=seed)
    budget = data.draw(st.integers(2, n // 3))
    ordered = interactions.values.sort(descending=True).values[:budget]
    fading = 1 - (1 - saturation) ** 2
    counted = budget if ordered[-1] >= fading * ordered[0] else int((ordered >= fading * ordered[0]).sum())
    rule = NewtonGreedy(0.01)
    found = saturating_ridge(interactions, rule, budget, saturation)
    assert last(interactions, found, counted) >= saturation
    assert found.ridge >= rule.ridge
    if found.ridge > rule.ridge:
        below = max(rule.ridge, found.ridge / 1.03)
        assert last(interactions, NewtonGreedy(below), counted) < saturation
        assert last(interactions, NewtonGreedy(rule.ridge), counted) < saturation


def test_a_ridge_that_lasts_is_kept() -> None:
    interactions = whitened(60)
    rule = NewtonGreedy(1e4, torch.full((60,), 0.1))
    found = saturating_ridge(interactions, rule, 10)
    assert found.ridge == 1e4
    assert torch.equal(found.unseen, rule.unseen)


def test_rows_like_a_narrow_target_are_wanted_to_the_end() -> None:
    """Twenty rows along the target, two of which fit it to the end, and others across it, which do nothing."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(80, 7, generator=generator).double() / 7**0.5
    along = torch.cat([torch.ones(20, 1), torch.zeros(60, 1)]).double()
    rows = torch.cat([along, torch.where(along > 0, 0.3, 1.0) * noise], dim=1)
    interactions = Interactions.from_features(rows, torch.eye(1, 8).double())
    short = saturating_ridge(interactions, NewtonGreedy(0.01), 20)
    found = [set(interactions.select(rule, 20).ids) for rule in (NewtonGreedy(0.01), short)]
    assert len(found[0] & set(range(20))) < 12
    assert found[1] == set(range(20))


def test_a_ridge_needs_a_pool_that_helps() -> None:
    interactions = Interactions(torch.tensor([-1.0, -2.0]), torch.ones(2, 1), ids=range(2), weight=0.5)
    with pytest.raises(ValueError, match=r"saturating_ridge: no row of the pool is predicted .*, or give the ridge\."):
        saturating_ridge(interactions, NewtonGreedy(), 1)
    with pytest.raises(ValueError, match=r"`saturating_ridge\(saturation=2\)`: expected a share in"):
        saturating_ridge(whitened(20), NewtonGreedy(), 1, 2)


def test_the_curve_of_the_gain() -> None:
    rule, values = InteractionGreedy(), torch.tensor([1.0, -1.0])
    features = torch.ones(2, 1)
    assert gain_curve(rule.select(values, features, budget=2)).tolist() == [1.0, -4.0]  # gains of -0.5 and 2.5
    assert gain_curve(TopK().select(-torch.ones(3), budget=2)).tolist() == [0.0, 0.0]
