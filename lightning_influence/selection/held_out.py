"""Ridge, weight or kind of gradient chosen by target examples that the selection has not looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from lightning_influence.estimators.interactions import Interactions, ScoreMatrix
from lightning_influence.selection.base import SelectionRule
from lightning_influence.selection.budget import resolve_budget
from lightning_influence.selection.held_out_choice import FOLDS, HeldOutChoice, check_folds
from lightning_influence.selection.interaction_greedy import InteractionGreedy
from lightning_influence.selection.newton_greedy import NewtonGreedy
from lightning_influence.selection.ridge_choice import RIDGES
from lightning_influence.selection.saturation import own_optimum

if TYPE_CHECKING:
    from lightning_influence.selection.newton_pool import NewtonPool  # which chooses its ridge here

STEPS = tuple(10 ** (-k / 4) for k in range(13))  # weights as shares of a row's own optimum, down to a thousandth

Moves: TypeAlias = Callable[[Tensor, Tensor], Iterator[Tensor]]  # places kept and held out -> x [held out, k], each


def held_out_ridge(
    pool: NewtonPool,
    budget: int | float,
    *,
    ridges: Sequence[float] = RIDGES,
    folds: int = FOLDS,
    seed: int = 0,
    screen: bool = True,
) -> HeldOutChoice:
    """Tries ridges of `NewtonGreedy`: rows selected by some of the targets, their Newton step measured on the others.

    ``Newton(ridge="held-out")`` takes the best one, from `DataSelector` on.

    The whole selection is made anew for every fold and ridge, as `NewtonPool.select` makes it. What is measured is how
    well the step fits targets of the kind that the rows were selected by, and it says hardly anything against a small
    ridge: on digits, with and without wrong labels, 0.01 or 0.03 explained most, by little. Networks trained on the
    selections came out no better than with the 0.05 to 0.2 of random selections (`NewtonPool.ridge`): held-out loss
    0.03 higher at 50 of 1000 rows, 0.02 at 100, the same at 200 (three seeds, `examples/subset_selection.py`).

    Args:
        pool: Whitened gradients.
        budget: Number or share of rows.
        ridges: To try.
        folds: Parts of the targets, each of which is held out once; as many as there are targets leave out one.
        seed: Of the parts.
        screen: Whether rows that the others contradict are left out first, as `NewtonPool.select` has it.

    Raises:
        ValueError: If the budget does not fit the pool, there are not from 2 to m folds, no ridge is given, or there is
            not one curvature target for each target.
    """
    call = "held_out_ridge"
    k = resolve_budget(budget, len(pool.features), call)
    tried = tuple(NewtonGreedy(ridge) for ridge in ridges)
    _check_candidates(call, tried, "ridges")

    def moves(kept: Tensor, held_out: Tensor) -> Iterator[Tensor]:
        known = _of_targets(call, pool, kept)
        known = known.screened(k) if screen else known
        for rule in tried:
            picks = known.interactions.select(known.rule(k, rule), k).positions
            yield _newton_moves(known, picks, rule.ridge, pool.targets[held_out])

    return HeldOutChoice(tuple(ridges), _explained(call, _counts(pool.targets, pool.shares), folds, seed, moves))


def held_out_weight(
    scores: Tensor | ScoreMatrix,
    budget: int | float,
    *,
    curvature_scores: Tensor | ScoreMatrix | None = None,
    shares: Tensor | None = None,
    rule: SelectionRule | None = None,
    weights: Sequence[float] | None = None,
    folds: int = FOLDS,
    seed: int = 0,
) -> HeldOutChoice:
    """Tries weights of an added row: rows selected by some of the targets, their sum measured on the others.

    With the weight w the picks S move a target by x_t = w Σ_{i∈S} g_tᵀ H⁻¹ g_i, and the explained share is F+I of the
    held-out targets ([IA] section 3.1, eq. 8) as a share of the most that it can be. ``weight="held-out"`` of
    `select_training_data` and `DataSelector` takes the best one.

    On digits the weight was 0.8 to 1.4 times that of `saturating_weight`. Networks trained on the selections had the
    same held-out loss to 0.02 at 50 and 100 of 1000 rows, and at 200 with a fifth of wrong labels 0.48 against 0.35:
    past the saturating weight wrong labels are picked, because they undo an overshoot (three seeds).

    Args:
        scores: g_tᵀ H⁻¹ g_i [m, n], as `Interactions.from_scores` takes them.
        budget: Number or share of rows.
        curvature_scores: The same [m, n] for one draw of labels of each target, for the Fisher that rows are selected
            by; None: the targets' own labels.
        shares: Factor of each target example in the loss that shall fall, [m]; None for the mean.
        rule: Rule that looks at interactions; None for ``InteractionGreedy()``.
        weights: To try; None for `STEPS` of the weight at which a row is at its optimum alone, the median over the
            best rows.
        folds: Parts of the targets, each of which is held out once; as many as there are targets leave out one.
        seed: Of the parts.

    Returns:
        The choice, with the weights in the units of `Interactions.reweighted`.

    Raises:
        ValueError: If the budget does not fit the pool, there are not from 2 to m folds, no weight is given, a score
            is not finite, there is not one curvature score for each target, or no weight is given and no row of the
            pool is predicted to lower the target.
    """
    call = "held_out_weight"
    everything = Interactions.from_scores(scores, 1.0, curvature_scores, shares=shares)
    table, fisher = _numbers(scores), None if curvature_scores is None else _numbers(curvature_scores)
    _check_pairs(call, "scores", len(table), fisher)
    k = resolve_budget(budget, len(everything), call)
    rule = InteractionGreedy() if rule is None else rule
    tried = _weights(call, everything, k) if weights is None else tuple(weights)
    _check_candidates(call, tried, "weights")

    def moves(kept: Tensor, held_out: Tensor) -> Iterator[Tensor]:
        drawn, counted = _part(fisher, kept), _part(shares, kept)
        known = Interactions.from_scores(table[kept], 1.0, drawn, everything.ids, shares=counted)
        for weight in tried:
            picks = list(known.reweighted(weight).select(rule, k).positions)
            yield weight * table[held_out][:, picks].cumsum(1)

    return HeldOutChoice(tried, _explained(call, _counts(table, shares), folds, seed, moves))


def held_out_pool(
    pools: Mapping[str, NewtonPool],
    budget: int | float,
    *,
    judge: str | None = None,
    folds: int = FOLDS,
    seed: int = 0,
    screen: bool = True,
) -> HeldOutChoice:
    """Tries kinds of gradients, such as raw ones and ones of unit length: which selects better for held-out targets?

    Each selects by some of the targets, as `NewtonPool.select` does. What they explain in their own units cannot be
    compared; one of them judges all selections, by its Newton step at the ridge that random rows ask for. On digits
    both kinds explained the same to 0.01, and networks trained on either were equally good within 0.02.

    `DataSelector` has no such setting, for gradients of another kind ask for another pass over the pool: make both
    pools, and give ``normalise`` what is best here.

    Args:
        pools: Of the same rows and targets in the same order, by name.
        budget: Number or share of rows.
        judge: Name of the pool whose estimate all are measured by; None for the first.
        folds: Parts of the targets, each of which is held out once; as many as there are targets leave out one.
        seed: Of the parts.
        screen: Whether rows that the others contradict are left out first.

    Raises:
        ValueError: If the pools differ in their rows or targets, the judge is none of them, or as `held_out_ridge`.
    """
    call = "held_out_pool"
    _check_candidates(call, tuple(pools), "pools")
    sizes = {(len(pool.features), len(pool.targets)) for pool in pools.values()}
    judge = next(iter(pools)) if judge is None else judge
    if len(sizes) > 1 or judge not in pools:
        raise ValueError(
            f"`{call}(pools, judge={judge!r})`: expected the same rows and targets in every pool, and one of "
            f"{', '.join(map(repr, pools))} as the judge. Got (rows, targets) {sorted(sizes)}."
        )
    measure = pools[judge]
    k = resolve_budget(budget, len(measure.features), call)
    ridge = measure.ridge(k).best

    def moves(kept: Tensor, held_out: Tensor) -> Iterator[Tensor]:
        for pool in pools.values():
            picks = _of_targets(call, pool, kept).select(k, screen=screen).positions
            yield _newton_moves(measure, picks, ridge, measure.targets[held_out])

    counts = _counts(measure.targets, measure.shares)
    return HeldOutChoice(tuple(pools), _explained(call, counts, folds, seed, moves))


def _explained(call: str, counts: Tensor, folds: int, seed: int, moves: Moves) -> Tensor:
    """Σ_t counts_t (1 − (1 − x_t)²) over all targets that count, each held out once, [number of candidates, k]."""
    parts = []
    for kept, held_out in _folds(call, counts, folds, seed):
        own = counts[held_out]
        parts.append(torch.stack([own @ (1 - (1 - found).square()) for found in moves(kept, held_out)]))
    return torch.stack(parts).sum(0).cpu()


def _counts(targets: Tensor, shares: Tensor | None) -> Tensor:
    """How much each target counts, [m], float64; negative for what shall be avoided; absolute values add up to 1."""
    counts = targets.new_ones(len(targets)) if shares is None else shares.to(targets)
    return counts.double() / counts.abs().sum()


def _folds(call: str, counts: Tensor, folds: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Places of targets that are kept and held out, in parts of as equal size as can be; those without a share stay."""
    counted = counts.cpu().nonzero().flatten()
    check_folds(f"{call}(folds={folds!r})", folds, len(counted))
    order = counted[torch.randperm(len(counted), generator=torch.Generator().manual_seed(seed))]
    for held_out in order.tensor_split(folds):
        kept = torch.ones(len(counts), dtype=torch.bool)
        kept[held_out] = False
        yield kept.nonzero().flatten(), held_out.sort().values


def _of_targets(call: str, pool: NewtonPool, places: Tensor) -> NewtonPool:
    """The pool with some of its targets."""
    fisher = pool.curvature_targets
    _check_pairs(call, "pool", len(pool.targets), fisher)
    goals, shares = pool.targets[places], _part(pool.shares, places)
    return replace(pool, targets=goals, curvature_targets=_part(fisher, places), shares=shares)


def _part(rows: Tensor | None, places: Tensor) -> Tensor | None:
    return None if rows is None else rows[places]


def _numbers(scores: Tensor | ScoreMatrix) -> Tensor:
    """[m, n], float64."""
    return (scores if isinstance(scores, Tensor) else scores.total()).detach().double()


def _weights(call: str, pool: Interactions, k: int) -> tuple[float, ...]:
    """Shares of the weight at which a row is at its optimum alone, among rows that lower the target."""
    helpful = int((pool.values > 0).sum())
    if not helpful:
        raise ValueError(
            f"{call}: no row of the pool is predicted to lower the target loss on its own. Check that pool and target "
            "fit together, or give the weights."
        )
    return tuple(own_optimum(pool, min(k, helpful)) * step for step in STEPS)


def _newton_moves(pool: NewtonPool, picks: Sequence[int], ridge: float, goals: Tensor) -> Tensor:
    """x [m, k]: how far the Newton step on the first j picks moves each goal along its own gradient.

    With L Lᵀ = D + Φ_S Φ_Sᵀ, x = Φ_t Φ_Sᵀ L⁻ᵀ L⁻¹ 1 is a sum over picks, and the first j terms are x of the first j.
    """
    rows = pool.features[list(picks)].double()
    unseen = torch.zeros(len(pool.features)) if pool.unseen is None else pool.unseen
    squares = float(torch.linalg.vector_norm(pool.features, dtype=torch.float64)) ** 2 + float(unseen.sum())
    dampings = unseen.to(rows)[list(picks)] + ridge * squares / len(pool.features)
    factor = torch.linalg.cholesky(rows @ rows.T + dampings.diag())
    seen = torch.cat([rows @ goals.double().T, rows.new_ones(len(rows), 1)], dim=1)
    solved = torch.linalg.solve_triangular(factor, seen, upper=False)
    moves: Tensor = (solved[:, :-1] * solved[:, -1:]).cumsum(0).T
    return moves


def _check_pairs(call: str, what: str, targets: int, fisher: Tensor | None) -> None:
    if fisher is not None and len(fisher) != targets:
        raise ValueError(
            f"`{call}({what})`: expected one curvature target for each of {targets} targets, so that both can be held "
            f"out. Got {len(fisher)}."
        )


def _check_candidates(call: str, candidates: Sequence[object], what: str) -> None:
    if not candidates:
        raise ValueError(f"`{call}({what}=())`: expected at least one.")
