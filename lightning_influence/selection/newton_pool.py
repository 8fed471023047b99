"""A pool and a target in whitened gradients, for `NewtonGreedy`: with a ridge that suits both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_influence.capture import ExampleLoader
from lightning_influence.estimators.factors import Id
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.estimators.interactions import Interactions
from lightning_influence.estimators.whitened import score_features
from lightning_influence.selection.budget import resolve_budget
from lightning_influence.selection.newton_greedy import NewtonGreedy
from lightning_influence.selection.selection import Selection

SHARES = tuple(10 ** (k / 2) for k in range(-8, 1))  # 0.0001 to 1, two to a decade


@dataclass(frozen=True, eq=False)
class RidgeChoice:
    """How well random rows predict the targets, by ridge.

    Attributes:
        ridges: Tried, ascending; as `NewtonGreedy` takes them.
        errors: Mean over draws of ‖1 − Φ_t w‖² / m, [number of ridges]; 1 is what no row at all gives.
    """

    ridges: tuple[float, ...]
    errors: Tensor

    @property
    def best(self) -> float:
        """The ridge of the least error; the larger one of equals."""
        return self.ridges[int((self.errors == self.errors.min()).nonzero()[-1])]


@dataclass(frozen=True, eq=False)
class NewtonPool:
    """Whitened gradients of a pool and of the target examples.

    Attributes:
        features: Φ [n, r].
        targets: Φ_t [m, r], in the same basis.
        curvature_targets: Features under labels sampled from the model, for their Fisher; None: their own labels.
        ids: Ids of the pool; row numbers when None.
        damping: Of the curvature that they were whitened with, for the description.
    """

    features: Tensor
    targets: Tensor
    curvature_targets: Tensor | None = None
    _: KW_ONLY
    ids: Sequence[Id] | None = None
    damping: str | float | None = None

    @classmethod
    def scored(
        cls,
        influence: InfluenceFunction,
        targets: Any,
        pool: Any,
        *,
        target_curvature: Literal["empirical", "sampled"] = "empirical",
        seed: int = 0,
    ) -> Self:
        """From influence scores alone, for models and pools of any size; no gradient is kept.

        A pool gradient is known by its inner products with those of the targets, so what no target sees of it is
        taken for 0 in the inner products of the pool itself (`score_features`). That tells rows apart in as many
        directions as there are targets: for budgets beyond that number `whitened` is the better choice.

        Args:
            influence: Fitted.
            targets: Map-style dataset or DataLoader of the target examples.
            pool: Map-style dataset or DataLoader of the rows to choose from.
            target_curvature: Labels of the Fisher of the targets: their own, or sampled from the model.
            seed: Of sampled labels.
        """
        scores = influence.score(targets, pool)
        own = influence.score(targets, targets).total()
        rows = scores.total()
        n = rows.shape[1]
        if target_curvature == "sampled":
            drawn = influence.score(targets, targets, labels="sampled", seed=seed).total()
            rows = torch.cat([rows, drawn.T], dim=1)
        found, goals = score_features(rows, own)
        fisher = found[n:] if target_curvature == "sampled" else None
        return cls(found[:n], goals, fisher, ids=scores.train_ids, damping=scores.damping)

    @classmethod
    def whitened(cls, influence: InfluenceFunction, targets: Any, pool: Any) -> Self:
        """From the gradients themselves, whole for small pools or projected (`ProjectedGram`).

        Args:
            influence: Fitted, with a curvature that has a square root.
            targets: Map-style dataset or DataLoader of the target examples.
            pool: Map-style dataset or DataLoader of the rows to choose from.

        Raises:
            ValueError: As `InfluenceFunction.features`.
        """
        goals = influence.features(targets, supervised=True)
        ids = ExampleLoader(pool, influence.batch_size).ids
        return cls(influence.features(pool), goals, ids=ids, damping=influence.damping)

    @cached_property
    def interactions(self) -> Interactions:
        """The same as values, features and metric, at weight 1."""
        parts = (self.features, self.targets, self.curvature_targets)
        return Interactions.from_features(*parts, self.ids, damping=self.damping)

    def ridge(self, budget: int | float, *, draws: int = 8, seed: int = 0) -> RidgeChoice:
        """Tries ridges on random selections of the budget's size, which have not looked at the targets.

        For each of them the Newton step is taken on rows drawn at random, and its prediction for the targets is
        compared with the 1 that it should be. Why random rows: chosen rows fit the targets that they were chosen
        by, and on held-out targets of the same kind too, the better the smaller the ridge; retrained models say
        otherwise.

        Args:
            budget: Number or share of rows.
            draws: Random selections.
            seed: Of the draws.

        Raises:
            ValueError: If the budget does not fit the pool.
        """
        k = resolve_budget(budget, len(self.features), "NewtonPool.ridge")
        generator = torch.Generator().manual_seed(seed)
        mean = float(torch.linalg.vector_norm(self.features, dtype=torch.float64)) ** 2 / len(self.features)
        errors = torch.zeros(len(SHARES), dtype=torch.float64)
        for _ in range(draws):
            rows = torch.randperm(len(self.features), generator=generator)[:k]
            dampings = [k * share * mean for share in SHARES]
            steps = _newton_steps(self.features[rows].double(), dampings)
            errors += torch.stack([(1 - self.targets.double() @ w).square().mean() for w in steps]).cpu() / draws
        return RidgeChoice(tuple(k * share for share in SHARES), errors)

    def select(self, budget: int | float, rule: NewtonGreedy | None = None) -> Selection:
        """Rows chosen by the rule; None for the ridge that `ridge` finds."""
        return self.interactions.select(self.rule(budget) if rule is None else rule, budget)

    def rule(self, budget: int | float) -> NewtonGreedy:
        """The rule with the ridge that `ridge` finds."""
        return NewtonGreedy(self.ridge(budget).best)


def _newton_steps(rows: Tensor, dampings: Sequence[float]) -> Iterator[Tensor]:
    """w = Φᵀ(μ I + Φ Φᵀ)⁻¹ 1 [r] for each μ, from the smaller of the two Gram matrices."""
    if len(rows) <= rows.shape[1]:
        spectrum, basis = torch.linalg.eigh(rows @ rows.T)
        basis, slope = rows.T @ basis, basis.sum(0)
    else:
        spectrum, basis = torch.linalg.eigh(rows.T @ rows)
        slope = basis.T @ rows.sum(0)
    for damping in dampings:
        yield basis @ (slope / (spectrum.clamp_min(0) + damping))
