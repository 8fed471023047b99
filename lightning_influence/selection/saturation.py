"""The weight of an added row, found where the predicted gain saturates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_influence.estimators.group_influence import Interactions
from lightning_influence.selection.base import SelectionRule
from lightning_influence.selection.selection import Selection

EDGE = 20  # the first and the last of so many parts of the picks are compared
HALVINGS = 6  # of the interval on a logarithmic scale: the weight is exact to about one per cent


def saturating_weight(
    interactions: Interactions, rule: SelectionRule, budget: int, saturation: float = 0.05
) -> float:
    """The largest weight of an added row at which the last picks still gain something.

    First-order gains grow with the weight, interactions with its square. A small weight makes the rule additive: it
    takes the same kind of row again and again. With a large one a few rows exhaust the estimate, and the others are
    picked because they undo their overshoot, wrong labels first. In between the estimate is used up just when the
    budget is: at the returned weight the last twentieth of the picks gains ``saturation`` times what the first
    twentieth does.

    The formula's own weights, 1/n and 1/k, suit some models and pools and miss others by orders of magnitude,
    because a model trained on the selection goes as far along the chosen directions as its training takes it, not
    the one Newton step of the estimate.

    Args:
        interactions: Of the pool, at any weight.
        rule: A rule that looks at interactions.
        budget: Number of rows.
        saturation: Share of the first gains that the last ones shall still have, in (0, 1).

    Returns:
        The weight, in the units of ``interactions.weight``.

    Raises:
        ValueError: If ``saturation`` is out of range, or no row of the pool is predicted to lower the target.
    """
    if not 0 < saturation < 1:
        raise ValueError(f"`saturating_weight(saturation={saturation!r})`: expected a share in (0, 1), such as 0.05.")
    best = float(interactions.values.max())
    if best <= 0:
        raise ValueError(
            "saturating_weight: no row of the pool is predicted to lower the target loss on its own. Check that pool "
            "and target fit together, or give the weight."
        )

    def lasts(weight: float) -> bool:
        gains = interactions.reweighted(weight).select(rule, budget).gains
        return _share(gains) >= saturation

    low, high = _bracket(lasts, _alone(interactions) / budget)
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if lasts(middle) else (low, middle)
    return low


def select_at_saturation(
    interactions: Interactions, rule: SelectionRule, budget: int, saturation: float = 0.05
) -> tuple[Selection, float]:
    """The rule's selection at the saturating weight, and the weight."""
    weight = saturating_weight(interactions, rule, budget, saturation)
    return interactions.reweighted(weight).select(rule, budget), weight


def _alone(interactions: Interactions) -> float:
    """Weight at which the row with the best first-order gain, alone, is at its optimum: b = K there."""
    row = interactions.ids[int(interactions.values.argmax())]
    own = float(interactions.pairwise([row]))
    value = float(interactions.values.max())
    return interactions.weight * (value / own if own > 0 else 1.0)


def _bracket(lasts: object, start: float) -> tuple[float, float]:
    """Two weights, a factor of 4 apart, between which the gains stop lasting."""
    assert callable(lasts)
    weight = start
    if lasts(weight):
        while lasts(4 * weight) and weight < 1e6 * start:
            weight *= 4
        return weight, 4 * weight
    while not lasts(weight / 4) and weight > 1e-6 * start:
        weight /= 4
    return weight / 4, weight


def _share(gains: Tensor) -> float:
    """Mean of the last gains over the mean of the first; gains are negative where the loss falls."""
    edge = max(1, len(gains) // EDGE)
    first = float(gains[:edge].mean())
    return float(torch.as_tensor(gains[-edge:]).mean()) / first if first < 0 else -math.inf
