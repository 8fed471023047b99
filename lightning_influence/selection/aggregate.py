"""Scores for several targets as one number for each row: named sets of queries, of any size, wanted or avoided."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Id, check_finite
from lightning_influence.estimators.interactions import Interactions
from lightning_influence.estimators.scores import Scores
from lightning_influence.selection.budget import Budget
from lightning_influence.selection.constraints import Constraints
from lightning_influence.selection.round_robin import RoundRobin
from lightning_influence.selection.selection import Selection
from lightning_influence.selection.top_k import TopK

Reduce: TypeAlias = Literal["mean", "max", "min"]
Across: TypeAlias = Literal["mean", "max", "min", "round-robin"]
Targets: TypeAlias = Mapping[str, Iterable[Id]] | None
Weights: TypeAlias = Mapping[str, float] | None


def target_scores(scores: Scores, targets: Targets, within: Reduce = "mean") -> Scores:
    """One row of scores for each named set of queries, [g, n], float64.

    Args:
        scores: [q, n], summed over components where they are kept apart.
        targets: Ids of the queries of each set; sets may be of any size and overlap. None: each query is a set.
        within: How the rows of a set become one: LESS takes the mean, RDS+ the largest.

    Raises:
        ValueError: If a set is empty, names a query that was not scored, or one twice; or a score is not finite.

    >>> scores = Scores(torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 5.0]]), (0, 1, 2), ("a", "b"), "dot", "sum")
    >>> target_scores(scores, {"maths": [0, 1], "law": [2]}).values.tolist()
    [[2.0, 1.0], [5.0, 5.0]]
    """
    call = "target_scores"
    _check_choice(call, "within", within, get_args(Reduce))
    table = _table(call, scores)
    sets = _sets(call, scores, targets)
    rows = [_reduced(table[members], within) for members in sets.values()]
    note = "" if targets is None else f", {within} over the queries of each target"
    return replace(
        scores,
        values=torch.stack(rows),
        query_ids=scores.query_ids if targets is None else tuple(sets),
        formula=f"{scores.formula}{note}",
        components=None,
    )


def aggregate(
    scores: Scores,
    across: Reduce = "mean",
    *,
    targets: Targets = None,
    weights: Weights = None,
    within: Reduce = "mean",
) -> Tensor:
    """One value for each training example out of its scores for several targets, float64 [n].

    It is what rules without interactions take: ``TopK().select(aggregate(scores, "max"), ids=scores.train_ids, ...)``.

    Args:
        scores: [q, n].
        across: How the targets' scores become one: their mean, the largest (good for one target is enough, as in LESS),
            or the smallest (good for all).
        targets: As in `target_scores`.
        weights: Factors of the targets' scores, taken before; 1 for those that are not named. A negative one makes it a
            target to avoid: what helps it counts against the row.
        within: As in `target_scores`.

    Raises:
        ValueError: As `target_scores`, or if a weight is not finite, of an unknown target, or all are 0.
    """
    _check_choice("aggregate", "across", across, get_args(Reduce))
    found = target_scores(scores, targets, within)
    factors = _factors("aggregate", found.query_ids, weights)
    return _reduced(found.values * factors[:, None], across)


def target_interactions(
    scores: Scores,
    targets: Targets = None,
    weights: Weights = None,
    *,
    weight: float | None = None,
    curvature_scores: Scores | None = None,
) -> Interactions:
    """Interactions for the weighted mean of several targets, f = (1/g) Σ w_t f_t, f_t the mean loss of one set.

    Its gradient and its Fisher H_f are the same means of those of the sets, so that rules that look at interactions
    choose for all of them at once ([IA] section 3.1). Sets of different size count alike. With a negative weight H_f is
    indefinite: f falls when the loss of that target rises.

    Args:
        scores: g_tᵀ H⁻¹ g_i [q, n] of an `InfluenceFunction`.
        targets: As in `target_scores`.
        weights: w_t, 1 for those that are not named.
        weight: Weight of one training example; 1/n by default, as in `Interactions.from_scores`.
        curvature_scores: Scores of the same queries with labels sampled from the model; None: those given.

    Raises:
        ValueError: As `aggregate`, or if the curvature scores are of other queries or training examples.
    """
    call = "target_interactions"
    table = _table(call, scores)
    sets = _sets(call, scores, targets)
    factors = _factors(call, tuple(sets), weights)
    shares = table.new_zeros(len(table))  # of each query in f
    for factor, members in zip(factors.tolist(), sets.values(), strict=True):
        shares[members] += factor / (len(sets) * len(members))
    fisher = None if curvature_scores is None else _table(call, curvature_scores)
    if curvature_scores is not None:
        _check_same(call, scores, curvature_scores)
    kind = f"{'empirical' if curvature_scores is None else 'sampled'} Fisher of {len(sets)} targets"
    found = Interactions.from_scores(table, weight, fisher, scores.train_ids, shares=shares, target_curvature=kind)
    return replace(found, damping=scores.damping, reduction=scores.reduction)


def select_by_scores(
    scores: Scores,
    *,
    budget: Budget,
    constraints: Constraints | None = None,
    across: Across = "mean",
    targets: Targets = None,
    weights: Weights = None,
    within: Reduce = "mean",
) -> Selection:
    """Rows chosen by the scores of any estimator, as if they did not interact.

    >>> scores = Scores(torch.tensor([[3.0, 2.0, 0.0], [0.0, 0.0, 1.0]]), (0, 1), ("a", "b", "c"), "dot", "sum")
    >>> select_by_scores(scores, budget=2).ids, select_by_scores(scores, budget=2, across="round-robin").ids
    (('a', 'b'), ('a', 'c'))

    Args:
        scores: [q, n].
        budget: Number of rows, share of the pool, or `TokenBudget`.
        constraints: What the selection must keep to besides.
        across: As in `aggregate`: the rows with the largest values are taken. Or ``"round-robin"``: the targets take
            turns (`RoundRobin`).
        targets: As in `target_scores`.
        weights: As in `aggregate`; a round-robin has none.
        within: As in `target_scores`.

    Raises:
        ValueError: As `aggregate` and `SelectionRule.select`, or if weights are given to a round-robin.
    """
    _check_choice("select_by_scores", "across", across, get_args(Across))
    if across != "round-robin":
        values = aggregate(scores, across, targets=targets, weights=weights, within=within)
        return TopK().select(values, budget=budget, ids=scores.train_ids, constraints=constraints)
    if weights is not None:
        raise ValueError(
            "`select_by_scores(across='round-robin', weights=...)`: every target takes its turn. Expected weights with "
            "'mean', 'max' or 'min'; leave a target out that shall be avoided."
        )
    found = target_scores(scores, targets, within)
    return RoundRobin(found).select(found.values.mean(0), budget=budget, ids=scores.train_ids, constraints=constraints)


def _reduced(rows: Tensor, how: Reduce) -> Tensor:
    if how == "mean":
        return rows.mean(0)
    return rows.amax(0) if how == "max" else rows.amin(0)


def _table(call: str, scores: Scores) -> Tensor:
    """Scores [q, n] in float64."""
    if not isinstance(scores, Scores):
        raise ValueError(
            f"`{call}(scores={type(scores).__name__})`: expected Scores, as an estimator's score() returns."
        )
    table = scores.total().detach().cpu().double()
    check_finite(call, "scores", table.isfinite().all(0), scores.train_ids)
    return table


def _sets(call: str, scores: Scores, targets: Targets) -> dict[str, list[int]]:
    """Rows of the scores that belong to each target."""
    if targets is None:
        return {str(name): [k] for k, name in enumerate(scores.query_ids)}
    where = {name: k for k, name in enumerate(scores.query_ids)}
    sets = {name: [_plain(member) for member in members] for name, members in targets.items()}
    if not sets:
        raise ValueError(f"`{call}(targets={{}})`: expected at least one named set of queries, or None.")
    for name, members in sets.items():
        unknown = [member for member in members if member not in where]
        if unknown or not members or len(set(members)) < len(members):
            what = f"unknown are {unknown[:5]}" if unknown else "it is empty" if not members else "some come twice"
            raise ValueError(
                f"`{call}(targets[{name!r}])`: expected ids of queries that were scored, at least one, each once; "
                f"{what}. The queries are {list(scores.query_ids[:5])}{'...' * (len(where) > 5)}."
            )
    return {name: [where[member] for member in members] for name, members in sets.items()}


def _factors(call: str, names: Sequence[Id], weights: Weights) -> Tensor:
    """The weight of each target, float64 [g]."""
    given = {} if weights is None else dict(weights)
    known = [str(name) for name in names]
    unknown = [name for name in given if name not in known]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), known, n=3, cutoff=0.0)
        raise ValueError(f"`{call}(weights)`: {unknown[:5]} are no targets; expected names among {known[:8]}: {near}?")
    wrong = {name: w for name, w in given.items() if isinstance(w, bool) or not math.isfinite(w)}
    factors = torch.tensor([float(given.get(name, 1.0)) for name in known], dtype=torch.float64)
    if wrong or not bool(factors.any()):
        raise ValueError(f"`{call}(weights={given})`: expected finite numbers that are not all 0.")
    return factors


def _check_same(call: str, scores: Scores, others: Scores) -> None:
    same = scores.query_ids == others.query_ids and scores.train_ids == others.train_ids
    if not same:
        raise ValueError(
            f"`{call}(curvature_scores)`: expected scores of the same queries and training examples in the same order; "
            f"got {others!r} beside {scores!r}."
        )


def _check_choice(call: str, argument: str, given: object, known: Sequence[str]) -> None:
    if given not in known:
        raise ValueError(f"`{call}({argument}={given!r})`: expected one of {list(known)}.")


def _plain(name: Any) -> Id:
    """An id without its numpy or torch clothes."""
    found: Id = name.item() if hasattr(name, "item") else name
    return found
