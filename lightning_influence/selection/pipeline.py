"""From a warm-up model, a pool and a target to a selection, without a Trainer."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_influence.capture import Component, ExampleLoader, ExampleLoss
from lightning_influence.capture.batches import leaves
from lightning_influence.capture.component import Select
from lightning_influence.capture.losses import resolve_loss
from lightning_influence.curvature import Curvature
from lightning_influence.estimators.group_influence import Interactions
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.selection.base import SelectionRule
from lightning_influence.selection.budget import resolve_budget
from lightning_influence.selection.interaction_greedy import InteractionGreedy
from lightning_influence.selection.saturation import saturating_weight
from lightning_influence.selection.selection import Selection

Weight: TypeAlias = Literal["saturate", "1/n", "1/k"] | float
TargetCurvature: TypeAlias = Literal["empirical", "sampled"]


def select_training_data(
    model: nn.Module,
    pool: Any,
    targets: Any,
    *,
    budget: int | float,
    rule: SelectionRule | None = None,
    curvature: Curvature | None = None,
    loss: ExampleLoss | Callable[[nn.Module, Any], Tensor] | None = None,
    components: Select | list[Component] = None,
    weight: Weight = "saturate",
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
        model: The warm-up model. Left as it was.
        pool: Map-style dataset or DataLoader of the rows to choose from; ids are positions in it.
        targets: Map-style dataset or DataLoader of the examples whose mean loss shall fall.
        budget: Rows as an int, or a share of the pool in (0, 1].
        rule: None for ``InteractionGreedy()``.
        curvature: None for ``EKFAC()``.
        loss: Per-example loss; None resolves it.
        components: What `find_components` takes.
        weight: Weight of one added row in the training objective: ``"saturate"`` for the largest at which the last
            picks still gain (`saturating_weight`), ``"1/k"`` or ``"1/n"`` as in the formula, or a number. Only the
            rules that look at interactions depend on it.
        target_curvature: Labels of the Fisher of the targets: their own, or sampled from the model.
        normalise: Whether gradients are scaled to unit length first, so that neither the length nor the loss of a
            row decides.
        batch_size: Examples per batch; None takes the loader's, or 32.
        seed: Of sampled labels.
        progress: Whether to show progress bars.

    Returns:
        The selection, in pick order, with gains as predicted changes of the mean target loss (of unit gradients
        when ``normalise``).

    Raises:
        ValueError: If an argument does not fit, before any long pass.

    Warns:
        UserWarning: If pool rows have nothing supervised (they are left out), stand in the pool twice, or also
            stand in the target set.
    """
    _check_options(weight, target_curvature)
    rows, goals = ExampleLoader(pool, batch_size), ExampleLoader(targets, batch_size)
    rows = _usable(model, rows, goals, loss, progress)
    k = resolve_budget(budget, rows.num_examples, "select_training_data")
    options: dict[str, Any] = {"normalise": normalise, "progress": progress}
    influence = InfluenceFunction(model, curvature, loss, components, **options).fit(rows)
    scores = influence.score(goals, rows)
    fisher = influence.score(goals, rows, labels="sampled", seed=seed) if target_curvature == "sampled" else None
    return choose(Interactions.from_scores(scores, 1 / k, fisher), rule or InteractionGreedy(), k, weight)


def choose(interactions: Interactions, rule: SelectionRule, budget: int, weight: Weight = "saturate") -> Selection:
    """The rule's selection, with the weight of a row resolved as `select_training_data` says."""
    if weight == "saturate":
        if not isinstance(rule, InteractionGreedy):
            return interactions.select(rule, budget)
        weight = saturating_weight(interactions, rule, budget)
    sizes = {"1/n": 1 / len(interactions), "1/k": 1 / budget}
    number = sizes[weight] if isinstance(weight, str) else float(weight)
    return interactions.reweighted(number).select(rule, budget)


@dataclass(frozen=True)
class PoolAudit:
    """What stands out in a pool before it is used; ids are positions.

    Attributes:
        unsupervised: Rows without any target.
        duplicates: Rows that repeat an earlier one.
        leaked: Rows that are also in the target set.
    """

    unsupervised: tuple[int, ...]
    duplicates: tuple[int, ...]
    leaked: tuple[int, ...]


def audit_pool(
    model: nn.Module,
    pool: ExampleLoader,
    targets: ExampleLoader,
    loss: ExampleLoss | Callable[[nn.Module, Any], Tensor] | None = None,
    progress: bool = True,
) -> PoolAudit:
    """Read pool and targets once, without the model, and report rows that a selection should not hide."""
    goals = {_digest(targets.dataset, k) for k in targets.ids}
    seen: set[str] = set()
    unsupervised, duplicates, leaked = [], [], []
    for ids, batch in tqdm(pool, desc="checking the pool", delay=3, leave=False, disable=not progress):
        counts = resolve_loss(model, batch, loss).supervised(batch).cpu()
        unsupervised += ids[counts == 0].tolist()
        for k in ids.tolist():
            digest = _digest(pool.dataset, k)
            if digest in seen:
                duplicates.append(k)
            if digest in goals:
                leaked.append(k)
            seen.add(digest)
    return PoolAudit(tuple(unsupervised), tuple(duplicates), tuple(leaked))


def _usable(
    model: nn.Module,
    rows: ExampleLoader,
    goals: ExampleLoader,
    loss: ExampleLoss | Callable[[nn.Module, Any], Tensor] | None,
    progress: bool,
) -> ExampleLoader:
    audit = audit_pool(model, rows, goals, loss, progress)
    reports = (
        (audit.unsupervised, "have no supervised target and are left out"),
        (audit.duplicates, "repeat an earlier row; interactions discount them, additive rules do not"),
        (audit.leaked, "also stand in the target set, so the selection may only memorise the target"),
    )
    for ids, what in reports:
        if ids:
            warnings.warn(f"{len(ids)} of {rows.num_examples} pool rows {what} (ids {list(ids[:8])}).", stacklevel=4)
    left = sorted(set(rows.ids) - set(audit.unsupervised))
    if not left:
        raise ValueError("select_training_data: no row of the pool has a supervised target; check the label mask.")
    return rows if len(left) == rows.num_examples else ExampleLoader(rows, indices=left)


def _digest(dataset: Any, k: int) -> str:
    hashed = hashlib.sha256()
    for leaf in leaves(dataset[k]):
        plain = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() if _is_array(leaf) else leaf
        hashed.update(plain.tobytes() if _is_array(leaf) else repr(plain).encode())
    return hashed.hexdigest()


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _check_options(weight: Weight, target_curvature: str) -> None:
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if weight not in ("saturate", "1/n", "1/k") and not (number and float(weight) > 0):
        raise ValueError(
            f"`select_training_data(weight={weight!r})`: expected 'saturate', '1/n', '1/k' or a number > 0."
        )
    if target_curvature not in ("empirical", "sampled"):
        raise ValueError(
            f"`select_training_data(target_curvature={target_curvature!r})`: expected 'empirical' or 'sampled'."
        )
