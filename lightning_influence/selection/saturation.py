"""The weight of an added row, or the ridge of a Newton step, found where the predicted gain saturates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors
from lightning_influence.estimators.interactions import Interactions
from lightning_influence.selection.base import SelectionRule
from lightning_influence.selection.newton_greedy import NewtonGreedy
from lightning_influence.selection.selection import Selection

EDGE = 20  # the first and the last of so many parts of the picks are compared
HALVINGS = 6  # of the interval on a logarithmic scale: the weight is exact to about two per cent


def saturating_weight(interactions: Interactions, rule: SelectionRule, budget: int, saturation: float = 0.05) -> float:
    """The largest weight of an added row at which the last picks still gain something.

    First-order gains grow with the weight, interactions with its square. A small weight makes the rule additive: it
    takes the same kind of row again and again. With a large one a few rows exhaust the estimate, and the others are
    picked because they undo their overshoot, wrong labels first. In between the estimate is used up just when the
    budget is: at the returned weight the last twentieth of the picks gains ``saturation`` times what the first
    twentieth does.

    Beyond the weight at which half of the best rows overshoot by themselves, rows gain because they do nothing, so
    the weight never exceeds it: with small budgets it is the answer, for a single row exactly its own optimum. Picks
    that would hardly gain at any weight, because the budget reaches far into the pool, do not count.

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
    _check("saturating_weight", interactions, saturation, "weight")
    picks = _counted(interactions.values, budget, saturation)

    def lasts(weight: float) -> bool:
        gains = interactions.reweighted(weight).select(rule, picks).gains
        return _share(gains) >= saturation

    alone = own_optimum(interactions, picks)
    low, high = _bracket(lasts, alone / picks, alone)
    for _ in range(HALVINGS if low < high else 0):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if lasts(middle) else (low, middle)
    return low


def saturating_ridge(
    interactions: Interactions, rule: NewtonGreedy, budget: int, saturation: float = 0.05
) -> NewtonGreedy:
    """The rule with the smallest ridge, its own or a larger one, at which the last picks still gain something.

    With a small ridge the Newton step fits the chosen rows to the end, as long training does: a few rows, alike and
    near a narrow target, then use the estimate up, and all others are picked for doing nothing to it. Training of an
    epoch or two does not get that far. Every row takes its share of the steps there, and rows that do nothing take it
    from the few that matter: of the targets of ``less_recipe.py`` those with short answers came out no better than
    with random rows. With a larger ridge a row counts for less, and more of the same kind are wanted, up to additive
    influence. At the returned one the last twentieth of the picks gains ``saturation`` times what the first does.

    Args:
        interactions: Of the pool, from features (`NewtonPool.interactions`).
        rule: With the ridge to begin with.
        budget: Number of rows.
        saturation: Share of the first gains that the last ones shall still have, in (0, 1).

    Raises:
        ValueError: If ``saturation`` is out of range, or no row of the pool is predicted to lower the target.
    """
    _check("saturating_ridge", interactions, saturation, "ridge")
    picks = _counted(interactions.values, budget, saturation)

    def lasts(ridge: float) -> bool:
        return _share(interactions.select(replace(rule, ridge=ridge), picks).gains) >= saturation

    low = high = rule.ridge
    while not lasts(high):  # ends: in the additive limit the counted picks last
        low, high = high, 4 * high
    for _ in range(HALVINGS if low < high else 0):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if lasts(middle) else (middle, high)
    return replace(rule, ridge=high)


def select_at_saturation(
    interactions: Interactions, rule: SelectionRule, budget: int, saturation: float = 0.05
) -> tuple[Selection, float]:
    """The rule's selection at the saturating weight, and the weight."""
    weight = saturating_weight(interactions, rule, budget, saturation)
    return interactions.reweighted(weight).select(rule, budget), weight


def gain_curve(selection: Selection) -> Tensor:
    """Share [k] of the largest predicted gain that is reached after each pick: where it is flat, rows do nothing.

    All 0 when no pick is predicted to lower the target loss.

    >>> from lightning_influence.selection import TopK
    >>> gain_curve(TopK().select(torch.tensor([0.75, 1.0, 0.25]), budget=3))
    tensor([0.5000, 0.8750, 1.0000], dtype=torch.float64)
    """
    predicted = -selection.gains.cumsum(0)
    best = float(predicted.max())
    return predicted / best if best > 0 else torch.zeros_like(predicted)


def _check(call: str, interactions: Interactions, saturation: float, instead: str) -> None:
    if not 0 < saturation < 1:
        raise ValueError(f"`{call}(saturation={saturation!r})`: expected a share in (0, 1), such as 0.05.")
    if float(interactions.values.max()) <= 0:
        raise ValueError(
            f"{call}: no row of the pool is predicted to lower the target loss on its own. Check that pool and target "
            f"fit together, or give the {instead}."
        )


def _counted(values: Tensor, budget: int, saturation: float) -> int:
    """Number of picks that can last: all of the budget, unless they fade without any interaction already."""
    best = values.sort(descending=True).values[:budget]
    fading = 1 - (1 - saturation) ** 2  # more than the saturation, so that there is room for interactions
    return budget if _share(-best) >= fading else int((best >= fading * best[0]).sum())


def own_optimum(interactions: Interactions, picks: int) -> float:
    """Weight at which a row is at its optimum alone, b = K there; the median over the rows with the best b."""
    pool = Factors(interactions.values, interactions.features, interactions.metric, tuple(interactions.ids))
    best = pool.values.sort(descending=True, stable=True).indices[:picks]
    values, own = pool.values[best], pool.self_interactions()[best]
    ratios = (values / own)[own > 0]
    return interactions.weight * (float(ratios.median()) if len(ratios) else 1.0)


def _bracket(lasts: Callable[[float], bool], start: float, limit: float) -> tuple[float, float]:
    """Two weights, at most a factor of 4 apart, between which the gains stop lasting; the limit twice if nowhere."""
    if not lasts(start):
        while not lasts(start / 4):  # ends: in the additive limit the counted picks last
            start /= 4
        return start / 4, start
    while start < limit:
        higher = min(4 * start, limit)
        if not lasts(higher):
            return start, higher
        start = higher
    return limit, limit


def _share(gains: Tensor) -> float:
    """Mean of the last gains over the mean of the first; gains are negative where the loss falls."""
    edge = max(1, len(gains) // EDGE)
    first = float(gains[:edge].mean())
    return float(gains[-edge:].mean()) / first if first < 0 else -math.inf
