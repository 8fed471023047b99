"""From a warm-up model, a pool and a target to a selection, without a Trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor, nn

from lightning_influence.capture import Component, ExampleLoader, ExampleLoss
from lightning_influence.capture.component import Select
from lightning_influence.curvature import EKFAC, Curvature
from lightning_influence.curvature.base import loss_for
from lightning_influence.estimators.factors import few
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.estimators.interactions import Interactions
from lightning_influence.estimators.queries import check_one_loss
from lightning_influence.estimators.scores import Scores
from lightning_influence.selection.aggregate import Across, Weights
from lightning_influence.selection.base import SelectionRule
from lightning_influence.selection.budget import Budget, TokenBudget, resolve_budget
from lightning_influence.selection.constraints import Constraints
from lightning_influence.selection.greedy_rule import GreedyRule
from lightning_influence.selection.held_out import held_out_weight
from lightning_influence.selection.held_out_choice import FOLDS, HeldOutChoice, check_folds
from lightning_influence.selection.interaction_greedy import InteractionGreedy
from lightning_influence.selection.named_targets import NamedTargets
from lightning_influence.selection.newton import Newton
from lightning_influence.selection.newton_greedy import NewtonGreedy
from lightning_influence.selection.newton_pool import NewtonPool
from lightning_influence.selection.pool_audit import PoolAudit, audit_pool
from lightning_influence.selection.saturation import saturating_weight
from lightning_influence.selection.selection import Selection
from lightning_influence.selection.selection_device import on_its_device
from lightning_influence.selection.terms import Terms, settle_terms

KnownWeight: TypeAlias = Literal["saturate", "1/n", "1/k"] | float  # from interactions alone
Weight: TypeAlias = Literal["held-out"] | KnownWeight
TargetCurvature: TypeAlias = Literal["empirical", "sampled"]
Leaks: TypeAlias = Literal["warn", "refuse", "exclude"]
Rule: TypeAlias = SelectionRule | Newton | Literal["newton"]

CALL = "select_training_data"


def select_training_data(
    model: nn.Module,
    pool: Any,
    targets: Any,
    *,
    budget: Budget,
    constraints: Constraints | None = None,
    leaks: Leaks = "warn",
    target_weights: Weights = None,
    across: Across = "mean",
    rule: Rule | None = None,
    curvature: Curvature | None = None,
    loss: ExampleLoss | Callable[[nn.Module, Any], Tensor] | None = None,
    components: Select | list[Component] = None,
    weight: Weight = "saturate",
    folds: int | None = None,
    target_curvature: TargetCurvature = "empirical",
    normalise: bool = True,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Selection:
    """Choose the rows of a pool to train on next, by their predicted effect on the loss of target examples.

    Fits the curvature on the pool (unless it is fitted), scores every row for every target example, and lets the
    rule choose; interactions come from the Fisher of the targets, so nothing larger than pool x targets is kept
    ([IA] sections 3.1 and 3.2).

    Args:
        model: The warm-up model. Left as it was. Rules look at a large pool on its device, if that is CUDA with room
            for the features (`selection_device`), and else on the CPU; the selection is the same up to rounding.
        pool: Map-style dataset or DataLoader of the rows to choose from; ids are positions in it.
        targets: Map-style dataset or DataLoader of the examples whose mean loss shall fall; or several such sets, of
            any size, by name, which count alike.
        budget: Rows as an int, a share of the pool in (0, 1], or `TokenBudget`, for which tokens are counted here.
        constraints: What the selection must keep to besides; rows are equal if their data are.
        leaks: Whether pool rows that also stand in the target set are told in a warning, refused, or left out.
        target_weights: Factors of the named sets, 1 for those left out; a negative one for what shall be avoided
            (`target_interactions`).
        across: With named sets: their weighted mean, or, with `TopK` alone, the largest or smallest of the weighted
            scores (`aggregate`), or ``"round-robin"``: the sets take turns (`RoundRobin`).
        rule: How rows are chosen. ``"newton"`` for ``Newton()``: `NewtonPool.select` by the scores of the pool for the
            targets and for landmarks of its own, without the rows that the others contradict; with
            ``Newton(ridge="saturate")`` for training of an epoch or two; with ``Newton(ridge="held-out")`` by
            `held_out_ridge`. `NewtonGreedy` has a ridge of its own, no landmarks and no screen. None for ``"newton"``,
            or for ``InteractionGreedy()`` where a ``weight`` is given, which only that has.
        curvature: None for ``EKFAC()``.
        loss: Per-example loss; None resolves it.
        components: What `find_components` takes.
        weight: Weight of one added row in the training objective: ``"saturate"`` for the largest at which the last
            picks still gain (`saturating_weight`), ``"held-out"`` for the one whose selections by some of the targets
            explain the others best (`held_out_weight`; as "saturate", with its warning, where no row is predicted to
            help), ``"1/k"`` or ``"1/n"`` as in the formula, or a number. Only the rules that look at interactions
            depend on it; the Newton step has its ridge instead.
        folds: Of ``weight="held-out"``: parts of the target examples, each of which is held out once; None for 5. Of
            the ridge, `Newton` has its own.
        target_curvature: Labels of the Fisher of the targets: their own, or sampled from the model.
        normalise: Whether gradients are scaled to unit length first, so that neither the length nor the loss of a
            row decides.
        batch_size: Examples per batch; None takes the loader's, or 32.
        seed: Of landmarks, and of sampled labels, of the targets and of the default curvature.
        progress: Whether to show progress bars.

    Returns:
        The selection, in pick order, with gains as predicted changes of the mean target loss (of unit gradients
        when ``normalise``); ``positions`` are those in the whole pool, like the ids. By the Newton step its ``rule``
        tells the ridge, and ``screened`` how many rows were left out first; else ``weight`` tells the weight. How
        either was chosen by held-out targets is ``held_out``.

    Raises:
        ValueError: If an argument does not fit, no selection can meet the constraints, rows leak that must not, there
            are fewer targets than folds to hold out, a target has nothing supervised, cannot be scored by the model or
            has a loss that is not finite, or a pool row holds a number that makes its loss so, before any pass of the
            model over the pool; if the loss of another pool row is not finite.
        UnsupportedLayerError: If the model has no component.

    Warns:
        UserWarning: If pool rows have nothing supervised (they are left out), stand in the pool twice, or also
            stand in the target set; if no row is predicted to lower the target loss.
    """
    if rule is None:
        rule = Newton() if weight == "saturate" else InteractionGreedy()
    rule = Newton() if rule == "newton" else rule
    _check_options(rule, curvature, weight, target_curvature, leaks)
    named = NamedTargets(CALL, targets, target_weights, across, batch_size)
    rows, goals = ExampleLoader(pool, batch_size, what="pool rows"), named.data
    named.check_rule(rule)
    check_held_out(CALL, rule, weight, folds, named)
    if not isinstance(budget, TokenBudget):
        resolve_budget(budget, rows.num_examples, CALL)
    if isinstance(rule, Newton):
        rule.landmarks_of(rows.num_examples, call=CALL)
    curvature = EKFAC(seed=seed) if curvature is None else curvature
    influence = InfluenceFunction(model, curvature, loss, components, normalise=normalise, progress=progress)
    _check_targets(influence, goals, rows, target_curvature)
    audit = audit_pool(model, rows, goals, loss, progress)
    rows = _usable(rows, audit, leaks, Constraints() if constraints is None else constraints)
    chooser = NewtonGreedy() if isinstance(rule, Newton) else rule
    terms = settle_terms(CALL, budget, constraints, chooser, rows, loss_for(model, rows, loss), audit)
    told: dict[str, Any] = {"target_curvature": target_curvature, "shares": named.shares, "seed": seed}
    told["landmarks"] = _landmarks(rule, influence, goals, rows)
    suspects = sorted(set(audit.suspects) & set(rows.ids))
    if suspects:
        influence.check(ExampleLoader(rows, indices=suspects), what="pool rows")
    influence.fit(rows)
    if isinstance(rule, Newton | NewtonGreedy):
        selection = _by_newton(on_its_device(NewtonPool.scored(influence, goals, rows, **told), model), rule, terms)
        return replace(selection, positions=tuple(int(name) for name in selection.ids))
    scores = influence.score(goals, rows)
    fisher = influence.score(goals, rows, labels="sampled", seed=seed) if target_curvature == "sampled" else None
    if named.across == "mean":
        interactions = on_its_device(named.interactions(scores, fisher, 1 / terms.rows), model)
        choice = _held_out(interactions, rule, scores, fisher, named, folds, terms) if weight == "held-out" else None
        plain = weight if weight != "held-out" else "saturate" if choice is None else choice.best
        number = resolve_weight(interactions, rule, terms.rows, plain)
        selection = replace(_select(interactions.reweighted(number), rule, terms), weight=number, held_out=choice)
    else:
        selection = replace(named.top(scores, terms), weight=1 / terms.rows)
    return replace(selection, positions=tuple(int(name) for name in selection.ids))


def check_held_out(call: str, rule: object, weight: Weight, folds: int | None, named: NamedTargets) -> None:
    """Refuse to hold out parts of targets where that cannot be done.

    Raises:
        ValueError: If there are fewer targets than folds, or folds are given for anything but a weight.
    """
    if weight == "held-out":
        number = FOLDS if folds is None else folds
        check_folds(f"{call}(weight='held-out', folds={number!r})", number, named.counted)
    elif folds is not None:
        raise ValueError(
            f"`{call}(folds={folds!r}, weight={weight!r})`: folds are for weight='held-out'. For a ridge expected them "
            "in the rule, Newton(ridge='held-out', folds=...)."
        )
    if isinstance(rule, Newton):
        rule.check_targets(named.counted, call)


def choose(interactions: Interactions, rule: SelectionRule, budget: int, weight: KnownWeight = "saturate") -> Selection:
    """The rule's selection, with the weight of a row resolved as `select_training_data` says."""
    number = resolve_weight(interactions, rule, budget, weight)
    return replace(interactions.reweighted(number).select(rule, budget), weight=number)


def resolve_weight(interactions: Interactions, rule: SelectionRule, budget: int, weight: KnownWeight) -> float:
    """The number that a weight stands for, with a budget of so many rows."""
    sizes = {"1/n": 1 / len(interactions), "1/k": 1 / budget}
    if weight == "saturate":
        return _saturating(interactions, rule, budget) if isinstance(rule, GreedyRule) else sizes["1/k"]
    return sizes[weight] if isinstance(weight, str) else float(weight)


def _held_out(
    interactions: Interactions,
    rule: SelectionRule,
    scores: Scores,
    fisher: Scores | None,
    named: NamedTargets,
    folds: int | None,
    terms: Terms,
) -> HeldOutChoice | None:
    """None where no row is predicted to lower the target, so that no weight is better than another."""
    if float(interactions.values.max()) <= 0:
        return None
    told: dict[str, Any] = {"curvature_scores": fisher, "shares": named.shares, "rule": rule}
    return held_out_weight(scores, terms.rows, folds=FOLDS if folds is None else folds, **told)


def check_data(
    model: nn.Module,
    pool: Any,
    targets: Any,
    *,
    curvature: Curvature | None = None,
    loss: ExampleLoss | Callable[[nn.Module, Any], Tensor] | None = None,
    components: Select | list[Component] = None,
    target_curvature: TargetCurvature = "empirical",
    normalise: bool = True,
) -> None:
    """Raises what `select_training_data` raises of its first batch of targets, in a moment."""
    curvature = EKFAC() if curvature is None else curvature
    influence = InfluenceFunction(model, curvature, loss, components, normalise=normalise, progress=False)
    goals = NamedTargets(CALL, targets).data
    first = ExampleLoader(goals, indices=goals.ids[: goals.batch_size])
    _check_targets(influence, first, ExampleLoader(pool), target_curvature)


def _check_targets(influence: InfluenceFunction, goals: ExampleLoader, rows: ExampleLoader, labels: str) -> None:
    """That they have losses, of the kind that the pool has, and labels that can be drawn where they shall be."""
    influence.check(goals, what="targets")
    check_one_loss(CALL, influence.model, rows, goals, influence.loss)
    curvature = influence.curvature
    if "sampled" in (labels, None if curvature.fitted else curvature.fisher):
        influence.check(ExampleLoader(goals, indices=goals.ids[:1]), labels="sampled")


def _select(interactions: Interactions, rule: SelectionRule, terms: Terms) -> Selection:
    parts = (interactions.values, interactions.features, interactions.metric)
    return rule.select(*parts, budget=terms.budget, ids=interactions.ids, constraints=terms.constraints)


def _landmarks(
    rule: SelectionRule | Newton, influence: InfluenceFunction, goals: ExampleLoader, rows: ExampleLoader
) -> int:
    """Room for landmarks is what the last pass for the targets has left, and what a table of scores may take."""
    if not isinstance(rule, Newton):
        return 0
    m, n, together = goals.num_examples, rows.num_examples, influence.queries_at_once
    room = min(-m % together, influence.memory_budget // (8 * n) - m)
    return rule.landmarks_of(n, max(0, room), CALL)


def _by_newton(known: NewtonPool, rule: Newton | NewtonGreedy, terms: Terms) -> Selection:
    if float(known.interactions.values.max()) <= 0:
        _warn_of_harm("", stacklevel=4)
    screen = isinstance(rule, Newton) and rule.screens
    return known.select(terms.budget, rule, screen=screen, constraints=terms.constraints)


def _saturating(interactions: Interactions, rule: SelectionRule, budget: int) -> float:
    if float(interactions.values.max()) > 0:
        return saturating_weight(interactions, rule, budget)
    _warn_of_harm(", with weight 1/k", stacklevel=5)
    return 1 / budget


def _warn_of_harm(how: str, stacklevel: int) -> None:
    warnings.warn(
        f"{CALL}: no row of the pool is predicted to lower the target loss; the least harmful ones are chosen{how}. "
        "Check that pool and targets fit together.",
        stacklevel=stacklevel,
    )


def _usable(rows: ExampleLoader, audit: PoolAudit, leaks: Leaks, constraints: Constraints) -> ExampleLoader:
    """The pool without rows that have no target, after saying what else stands out."""
    if leaks == "refuse" and audit.leaked:
        raise ValueError(
            f"`{CALL}(leaks='refuse')`: {len(audit.leaked)} of {audit.size} pool rows also stand in the target set "
            f"(ids {list(audit.leaked[:8])}). Take them out of one of the two, or pass leaks='exclude'."
        )
    left_out = {*audit.unsupervised, *(audit.leaked if leaks == "exclude" else ())}
    left = [k for k in rows.ids if k not in left_out]
    wanted = [k for k in constraints.must_include if k in left_out]
    if wanted:
        raise ValueError(
            f"`{CALL}(constraints)`: must_include names rows that are left out of the pool, {few(wanted)}: they have "
            "no supervised target, or stand in the target set too (leaks='exclude'). Expected rows to train on."
        )
    if not left:
        raise ValueError(
            f"{CALL}: no row of the pool has a supervised target; check the label mask."
            if len(audit.unsupervised) == len(rows.ids)
            else f"{CALL}: every row of the pool has no supervised target or also stands in the target set."
        )
    told = replace(audit, leaked=audit.leaked if leaks == "warn" else ())
    told = replace(told, duplicates=audit.duplicates if constraints.duplicates == "allow" else ())
    for remark in told.remarks:
        warnings.warn(f"{CALL}: {remark}", stacklevel=3)
    return ExampleLoader(rows, indices=left)


def _check_options(rule: object, curvature: object, weight: object, target_curvature: str, leaks: str) -> None:
    if not isinstance(rule, SelectionRule | Newton):
        raise ValueError(
            f"`{CALL}(rule={rule!r})`: expected a SelectionRule, such as InteractionGreedy() or TopK(), Newton() or "
            "'newton'."
        )
    if weight != "saturate" and isinstance(rule, Newton | NewtonGreedy):
        raise ValueError(
            f"`{CALL}(weight={weight!r})`: the Newton step has no weight of a row. Expected its ridge instead, such "
            f"as rule=Newton(ridge={'held-out' if weight == 'held-out' else 0.3!r})."
        )
    if weight == "held-out" and not isinstance(rule, GreedyRule):
        raise ValueError(
            f"`{CALL}(weight='held-out', rule={rule!r})`: only rules that look at interactions choose differently by "
            "the weight. Expected such a rule, as InteractionGreedy() is, or weight='saturate'."
        )
    if not isinstance(curvature, Curvature | None):
        raise ValueError(f"`{CALL}(curvature={curvature!r})`: expected a Curvature, such as EKFAC(damping=0.1).")
    positive = isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 < weight < math.inf
    if weight not in ("saturate", "held-out", "1/n", "1/k") and not positive:
        raise ValueError(f"`{CALL}(weight={weight!r})`: expected 'saturate', 'held-out', '1/n', '1/k' or a number > 0.")
    if target_curvature not in get_args(TargetCurvature):
        raise ValueError(f"`{CALL}(target_curvature={target_curvature!r})`: expected 'empirical' or 'sampled'.")
    if leaks not in get_args(Leaks):
        raise ValueError(f"`{CALL}(leaks={leaks!r})`: expected 'warn', 'refuse' or 'exclude'.")
