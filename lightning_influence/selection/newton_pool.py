"""A pool and a target in whitened gradients, for `NewtonGreedy`: with a ridge that suits both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_influence.capture import ExampleLoader
from lightning_influence.estimators.factors import Factors, Id
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.estimators.interactions import Interactions
from lightning_influence.estimators.whitened import BLOCK, score_features, thinned, unseen_squares
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.budget import Budget, TokenBudget, resolve_budget
from lightning_influence.selection.constraints import Constraints
from lightning_influence.selection.held_out import held_out_ridge
from lightning_influence.selection.newton import Newton
from lightning_influence.selection.newton_greedy import NewtonGreedy
from lightning_influence.selection.ridge_choice import NEARLY, NEARLY_SCREENED, RIDGES, RidgeChoice
from lightning_influence.selection.saturation import saturating_ridge
from lightning_influence.selection.selection import Selection
from lightning_influence.selection.target_shrinkage import pool_share, with_pool
from lightning_influence.selection.terms import expected_rows, in_numbers

OPPOSED = 1.5  # rows that count as contradicted for each with a negative agreement, as two of three wrong labels have


@dataclass(frozen=True, eq=False)
class NewtonPool:
    """Whitened gradients of a pool and of the target examples.

    Attributes:
        features: Φ [n, r].
        targets: Φ_t [m, r], in the same basis.
        curvature_targets: Features under labels sampled from the model, for their Fisher; None: their own labels.
        unseen: Squared length [n] of what the features leave out of each pool gradient, see `NewtonGreedy`; None for
            features of whole gradients.
        shares: Factor of each target example in the loss that shall fall, [m]; None for the mean.
        ids: Ids of the pool; row numbers when None.
        damping: Of the curvature that they were whitened with, for the description.
        shrink: Whether the pool counts in the target loss as far as the targets may differ from it by chance
            (`pool_share`), so that few of them are not overfitted.
    """

    features: Tensor
    targets: Tensor
    curvature_targets: Tensor | None = None
    _: KW_ONLY
    unseen: Tensor | None = None
    shares: Tensor | None = None
    ids: Sequence[Id] | None = None
    damping: str | float | None = None
    shrink: bool = False

    @classmethod
    def scored(
        cls,
        influence: InfluenceFunction,
        targets: Any,
        pool: Any,
        *,
        landmarks: int = 0,
        target_curvature: Literal["empirical", "sampled"] = "empirical",
        shares: Tensor | None = None,
        seed: int = 0,
    ) -> Self:
        """From influence scores alone, for models and pools of any size; no gradient is kept.

        A pool gradient is known by its inner products with those of the targets and of the landmarks, and by its
        length: the part of it that none of them sees is taken for orthogonal to that of any other row
        (`score_features`, ``unseen``).

        Args:
            influence: Fitted.
            targets: Map-style dataset or DataLoader of the target examples.
            pool: Map-style dataset or DataLoader of the rows to choose from.
            landmarks: Number of pool rows, drawn at random by id, that are scored like targets: in the same pass over
                the pool, as far as memory allows, and at their cost. Without them rows differ in as many ways as there
                are targets, which is too few for a selection of as many rows or more; all rows of the pool leave
                nothing out.
            target_curvature: Labels of the Fisher of the targets: their own, or sampled from the model.
            shares: Of each target example, [m], see `NewtonPool`.
            seed: Of landmarks and of sampled labels.

        Raises:
            ValueError: If ``landmarks`` is not an int from 0 to the number of rows.
        """
        loader = ExampleLoader(pool, influence.batch_size, what="pool rows")
        places = _draw_landmarks(loader, landmarks, seed)
        marks = ExampleLoader(loader, indices=[loader.ids[k] for k in places]) if places else None
        scores, lengths = influence.score_with_self(targets, loader, also=marks)
        rows, own = scores.total(), influence.score(targets, targets).total()
        m, n = len(own), loader.num_examples
        if places:
            own = torch.cat([torch.cat([own, rows[:m, places]], dim=1), rows[:, places].T])
        if target_curvature == "sampled":
            parts = [targets] if marks is None else [targets, marks]
            drawn = [influence.score(targets, part, labels="sampled", seed=seed).total() for part in parts]
            rows = torch.cat([rows, torch.cat(drawn, dim=1).T], dim=1)
        found, goals = score_features(rows, own)
        fisher = found[n:] if target_curvature == "sampled" else None
        unseen = unseen_squares(found[:n], lengths.total()[0])
        ids, damping = scores.train_ids, scores.damping
        return cls(found[:n], goals[:m], fisher, unseen=unseen, shares=shares, ids=ids, damping=damping)

    @classmethod
    def whitened(
        cls,
        influence: InfluenceFunction,
        targets: Any,
        pool: Any,
        *,
        path: str | Path | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> Self:
        """From the gradients themselves, whole for small pools or projected (`ProjectedGram`).

        Kept in at most n + m columns, with the same inner products.

        Args:
            influence: Fitted, with a curvature that has a square root.
            targets: Map-style dataset or DataLoader of the target examples.
            pool: Map-style dataset or DataLoader of the rows to choose from.
            path: For a pool whose features exceed the memory: the npy file that `InfluenceFunction.write_features`
                makes, or goes on with, and that they are read from. None for memory.
            dtype: Of the file.

        Raises:
            ValueError: As `InfluenceFunction.features`, or `write_features`.
            StoreError: If the file holds other features.
        """
        goals = influence.features(targets, supervised=True)
        ids, damping = ExampleLoader(pool, influence.batch_size).ids, influence.damping
        if path is not None:
            return cls(influence.write_features(pool, path, dtype=dtype).values, goals, ids=ids, damping=damping)
        return cls(*thinned(influence.features(pool), goals), ids=ids, damping=damping)

    def to(self, device: torch.device | str) -> Self:
        """The same on a device, where the ridge is found and rows are chosen then."""
        fisher = None if self.curvature_targets is None else self.curvature_targets.to(device)
        features, targets = self.features.to(device), self.targets.to(device)
        return replace(self, features=features, targets=targets, curvature_targets=fisher)

    @cached_property
    def interactions(self) -> Interactions:
        """The same as values, features and metric, at weight 1; of the mixed loss where targets are shrunk."""
        parts = (self.features, self.targets, self.curvature_targets)
        found = Interactions.from_features(*parts, self.ids, shares=self.shares, damping=self.damping)
        return with_pool(found, self.pool_share)

    @property
    def pool_share(self) -> float:
        """How much the pool counts in the target loss, in [0, 1); 0 unless targets are shrunk."""
        return pool_share(self.features, self.targets, self.shares, self.unseen) if self.shrink else 0.0

    def ridge(self, budget: int | float, *, draws: int = 8, seed: int = 0) -> RidgeChoice:
        """Tries ridges on random selections of the budget's size, which have not looked at the targets.

        For each of them the Newton step is taken on rows drawn at random, and its prediction for the targets is
        compared with the 1 that it should be, for each target as much as its share counts. Why random rows: chosen
        rows fit the targets that they were chosen by, and on held-out targets of the same kind too, the better the
        smaller the ridge; retrained models say otherwise.

        Args:
            budget: Number or share of rows.
            draws: Random selections.
            seed: Of the draws, by id: a permuted pool has the same.

        Raises:
            ValueError: If the budget does not fit the pool.
        """
        k = resolve_budget(budget, len(self.features), "NewtonPool.ridge")
        generator = torch.Generator().manual_seed(seed)
        unseen = torch.zeros(len(self.features)) if self.unseen is None else self.unseen
        mean = self._mean_square(self.features, unseen)
        by_id = torch.tensor(self._by_id)
        goals = self.targets.double()
        counts = goals.new_ones(len(goals)) if self.shares is None else self.shares.to(goals).abs()
        counts /= counts.sum()
        errors = torch.zeros(len(RIDGES), dtype=torch.float64)
        for _ in range(draws):
            rows = by_id[torch.randperm(len(self.features), generator=generator)[:k]]
            chosen, left_out = self.features[rows].double(), unseen[rows].to(self.features.device).double()
            steps = [_newton_step(chosen, left_out + ridge * mean) for ridge in RIDGES]
            errors += torch.stack([counts @ (1 - goals @ w).square() for w in steps]).cpu() / draws
        return RidgeChoice(RIDGES, errors)

    def agreement(self, ridge: float = 1.0) -> Tensor:
        """What all other rows and the targets predict for each row of the pool, float64 [n].

        Kernel ridge regression of the constant 1, as for the selection, on everything but the row itself: 1 where
        training on the others fits the row, 0 where it does nothing, negative where it raises the row's loss, as with
        most wrong labels. Targets of a share below 0 are left out. In closed form: O((n + m) r²).

        Args:
            ridge: As `NewtonGreedy` takes it. Its size hardly changes the order: an average over many rows is asked
                for, not their fit.

        Raises:
            ValueError: If the ridge is not a finite number > 0.
        """
        kept = self.targets if self.shares is None else self.targets[self.shares >= 0]
        features, goals = thinned(self.features, kept)
        parts, n = [*torch.split(features, BLOCK), goals.to(features.device)], len(features)
        unseen = features.new_zeros(n + len(goals), dtype=torch.float64)
        if self.unseen is not None:
            unseen[:n] = self.unseen.to(unseen)
        dampings = unseen + NewtonGreedy(ridge).ridge * self._mean_square(features, unseen)
        owns = torch.split(dampings, [len(part) for part in parts])
        precision = torch.eye(features.shape[1]).to(dampings)
        pull = dampings.new_zeros(features.shape[1])
        for part, own in zip(parts, owns, strict=True):  # a block in float64 at a time: features may be a memory map
            block = part.double()
            precision += block.T @ (block / own[:, None])
            pull += block.T @ (1 / own)
        covariance, found = torch.cholesky_inverse(torch.linalg.cholesky(precision)), []
        for part, own in zip(parts, owns, strict=True):
            block = part.double()
            reached = block @ covariance
            leverage = (reached * block).sum(1) / own
            found.append((reached @ pull - leverage) / (1 - leverage))
        return torch.cat(found)[:n].cpu()

    def opposed(self, budget: Budget, constraints: Constraints | None = None) -> Tensor:
        """Places of rows that the others contradict, the most contradicted first, for `select`.

        The rows of the smallest `agreement`, half as many again as are negative: two thirds of the wrong labels of
        MNIST and FashionMNIST are, and hardly any right one. Only rows that could be picked, and none that must be; as
        many as leave enough of them for the budget, of every source those with the largest agreement as far as its
        minimum asks for them (`Admission.spared`).

        Args:
            budget: Number or share of the pool's rows, or `TokenBudget` with counts.
            constraints: What the selection must keep to besides.

        Raises:
            ValueError: If the budget does not fit the pool, or no selection can meet the constraints.
        """
        return self._opposed(self._admission("NewtonPool.opposed", budget, constraints))

    def screened(self, budget: Budget, constraints: Constraints | None = None) -> Self:
        """The pool without its `opposed` rows; ids stay as they are."""
        return self._without(self.opposed(budget, constraints))

    def select(
        self,
        budget: Budget,
        rule: Newton | NewtonGreedy | None = None,
        *,
        screen: bool | None = None,
        constraints: Constraints | None = None,
    ) -> Selection:
        """Rows chosen by the rule, told what the features leave out.

        Args:
            budget: Number or share of the pool's rows, or `TokenBudget` with counts.
            rule: `Newton`, whose ridge is found here, on a screened pool the smaller one at 0.95 for "random"; for
                "held-out" every fold is screened by the targets that it keeps. Whether targets are shrunk is what it
                says, and with `NewtonGreedy` what the pool does. Its landmarks are those of the pool
                already. Where no row is predicted to lower the target, "saturate" is "random". `NewtonGreedy` for a
                ridge of its own; None for ``Newton()``.
            screen: Whether rows that the others contradict are left out first, as far as the budget and the
                constraints allow it (`opposed`): a row that helps the targets it is chosen by may still be a wrong
                label. None for what `Newton` says, and for True with `NewtonGreedy`.
            constraints: What the selection must keep to besides, in the ids of the pool.

        Returns:
            The selection; ``positions`` are places in the whole pool, ``pool_size`` counts what the screen left, and
            ``held_out`` tells how a ridge of "held-out" was chosen.

        Raises:
            ValueError: If the budget does not fit the pool, no selection can meet the constraints, or there are fewer
                targets than folds to hold out.
        """
        rule = Newton() if rule is None else rule
        admission = self._admission("NewtonPool.select", budget, constraints)
        settled = budget if isinstance(budget, TokenBudget) else resolve_budget(budget, len(self._names))
        rows, counted = expected_rows(settled, self._names), len(self.targets)
        shrink = rule.shrinks(counted) if isinstance(rule, Newton) else self.shrink
        pool = replace(self, shrink=shrink)
        screens = (not isinstance(rule, Newton) or rule.screens) if screen is None else screen
        choice = None
        if isinstance(rule, Newton) and rule.ridge == "held-out":
            choice = held_out_ridge(pool, rows, folds=rule.folds, screen=screens)
            rule = replace(rule, ridge=choice.best)
        if screens:
            pool, settled = pool._without(self._opposed(admission)), in_numbers(settled, self._names)
            if constraints is not None:
                closed = (~admission.optional).nonzero().flatten().tolist()
                constraints = constraints.of_part(pool._names, [self._names[row] for row in closed])
        greedy = pool._greedy(rule, min(rows, len(pool.features)), screens)
        parts = (pool.interactions.values, pool.interactions.features, pool.interactions.metric)
        selection = greedy.select(*parts, budget=settled, ids=pool._names, constraints=constraints)
        places = {name: row for row, name in enumerate(self._names)}
        positions = tuple(places[name] for name in selection.ids)
        screened = len(self._names) - len(pool._names)
        return replace(selection, positions=positions, screened=screened, held_out=choice)

    def rule(self, budget: int | float, rule: NewtonGreedy | None = None) -> NewtonGreedy:
        """The rule, told what the features leave out unless it knows; None for the ridge that `ridge` finds."""
        rule = NewtonGreedy(self.ridge(budget).best) if rule is None else rule
        return rule if rule.unseen is not None else replace(rule, unseen=self.unseen, ids=self._unseen_ids)

    def saturating_rule(self, budget: int | float, saturation: float = 0.05) -> NewtonGreedy:
        """The rule for a model that is trained on the selection briefly, an epoch or two, as instruction tuning is.

        With the ridge that `ridge` finds, or the smallest larger one at which the last twentieth of the picks still
        gains ``saturation`` times what the first does. With a smaller one a few rows near a narrow target use the
        estimate up, and the others are picked for doing nothing: harmless where training goes on until every row is
        fitted, but short training spends its steps on them.

        Raises:
            ValueError: If the budget does not fit the pool, ``saturation`` is not in (0, 1), or no row of the pool is
                predicted to lower the target.
        """
        k = resolve_budget(budget, len(self.features), "NewtonPool.saturating_rule")
        return saturating_ridge(self.interactions, self.rule(k), k, saturation)

    def _greedy(self, rule: Newton | NewtonGreedy, rows: int, screened: bool) -> NewtonGreedy:
        """The rule with the ridge that it asks for, for about so many rows."""
        if isinstance(rule, NewtonGreedy):
            return self.rule(rows, rule)
        number = rule.ridge
        if isinstance(number, str):
            number = self.ridge(rows).nearly(NEARLY_SCREENED if screened else NEARLY)
        found = self.rule(rows, NewtonGreedy(number))
        if rule.ridge != "saturate" or float(self.interactions.values.max()) <= 0:
            return found
        return saturating_ridge(self.interactions, found, rows, rule.saturation)

    def _admission(self, call: str, budget: Budget, constraints: Constraints | None) -> Admission:
        """What may be picked of the pool, before any screen."""
        own = self.interactions
        pool = Factors(own.values, own.features, own.metric, self._names)
        return (Constraints() if constraints is None else constraints).admission(call, pool, budget)

    def _opposed(self, admission: Admission) -> Tensor:
        agreement = self.agreement()
        optional = admission.optional.cpu()
        by_id = torch.tensor(self._by_id)
        order = by_id[agreement[by_id].argsort(stable=True)]
        number = round(OPPOSED * int((optional & (agreement < 0)).sum()))
        return torch.tensor(admission.spared(order[optional[order]][:number].tolist()), dtype=torch.long)

    def _mean_square(self, features: Tensor, unseen: Tensor) -> float:
        """Mean ‖φ‖² of the pool, the unseen part included; 1 without any gradient, where there is no scale."""
        squares = math.fsum(float(part.double().square().sum()) for part in torch.split(features, BLOCK))
        return (squares + float(unseen.sum())) / len(features) or 1.0

    def _without(self, rows: Tensor) -> Self:
        gone = set(rows.tolist())
        places = [row for row in range(len(self._names)) if row not in gone]
        unseen = None if self.unseen is None else self.unseen[places]
        return replace(self, features=self.features[places], unseen=unseen, ids=[self._names[row] for row in places])

    @property
    def _names(self) -> Sequence[Id]:
        return range(len(self.features)) if self.ids is None else self.ids

    @property
    def _by_id(self) -> list[int]:
        """Places in the order of their ids: what is drawn by it is the same rows of a permuted pool."""
        return sorted(range(len(self._names)), key=self._names.__getitem__)

    @property
    def _unseen_ids(self) -> Sequence[Id] | None:
        return None if self.unseen is None else self.ids


def _draw_landmarks(loader: ExampleLoader, landmarks: int, seed: int) -> list[int]:
    """Places [landmarks] in a pool, in the order of their ids; drawn among these, not among places."""
    n = loader.num_examples
    if isinstance(landmarks, bool) or not isinstance(landmarks, int) or not 0 <= landmarks <= n:
        raise ValueError(
            f"`NewtonPool.scored(landmarks={landmarks!r})`: expected an int from 0 to the pool's {n} rows."
        )
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:landmarks].sort().values
    by_id = sorted(range(n), key=loader.ids.__getitem__)
    return [by_id[k] for k in drawn.tolist()]


def _newton_step(rows: Tensor, dampings: Tensor) -> Tensor:
    """w = Φᵀ(D + Φ Φᵀ)⁻¹ 1 [r] with D [k] on the diagonal, from the smaller of the two systems."""
    k, r = rows.shape
    if k <= r:
        factor = torch.linalg.cholesky(rows @ rows.T + dampings.diag())
        return rows.T @ torch.cholesky_solve(rows.new_ones(k, 1), factor)[:, 0]
    weighted = rows / dampings[:, None]
    factor = torch.linalg.cholesky(weighted.T @ rows + torch.eye(r).to(rows))
    return torch.cholesky_solve(weighted.sum(0)[:, None], factor)[:, 0]
