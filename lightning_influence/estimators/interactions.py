"""Influence of a group of training examples: first order (F), and with interactions (F+I)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors, Id, check_finite, check_ids, check_weight, rows_of
from lightning_influence.estimators.interaction_views import (
    ClassInteractions,
    Spectrum,
    class_interactions,
    spectrum_of,
)
from lightning_influence.estimators.whitened import BLOCK, gram, thinned

Change = Literal["removal", "addition"]
Picks = TypeVar("Picks")
Picks_co = TypeVar("Picks_co", covariant=True)

FORMULA = "removal ∇fᵀU_S + ½ U_Sᵀ H_f U_S, addition −∇fᵀU_S + ½ U_Sᵀ H_f U_S ([IA] section 3.1, eq. 7 and 8)"
_FROM_SCORES = "Interactions.from_scores"


class ScoreMatrix(Protocol):
    """Labelled scores, as `Scores` has them: score > 0 means adding the training example lowers the target."""

    @property
    def train_ids(self) -> Sequence[Id]:
        """One id per column."""

    def total(self) -> Tensor:
        """Scores [m, n], summed over the components."""


class Rule(Protocol[Picks_co]):
    """A selection rule, seen from here."""

    def select(
        self,
        values: Tensor,
        features: Tensor | None = None,
        metric: Tensor | None = None,
        *,
        budget: Any,
        ids: Iterable[Id] | None = None,
        constraints: Any = None,
    ) -> Picks_co:
        """Chooses ``budget`` examples of the pool."""


@dataclass(frozen=True, eq=False)
class Interactions:
    """First-order influence b and interactions K = F M Fᵀ of n training examples on one target function f.

    u_i = weight · H⁻¹ g_i is the parameter shift of removing example i, b_i = ∇fᵀ u_i, K_ij = u_iᵀ H_f u_j
    ([IA] section 3.1). Any F and M with F M Fᵀ = K will do: F = u and M = H_f, or F = P without a metric when
    H_f is the Fisher of m target examples (`from_scores`). K itself is never formed.

    Attributes:
        values: b [n], float64. b_i > 0: adding example i lowers f, removing it raises f.
        features: F [n, r], any float dtype; sums over a group are taken in float64.
        metric: M [r, r], symmetric; the identity when None.
        ids: Ids of the examples, all int or all str.
        weight: Weight of one example in the training objective, already contained in values and features: 1/n
            as in the formula, or 1/k for a model that will be trained on k selected examples alone.
        target_curvature: How H_f was obtained, such as "empirical Fisher" or "exact".
        damping: Damping of H.
        reduction: "sum" or "mean": how an example's loss is reduced over its tokens.
        formula: What `estimate` computes.

    Raises:
        ValueError: If the pool is empty, shapes do not fit, ids repeat, a number is NaN or infinite (the ids are
            named), the metric is not symmetric or the weight is not positive.
    """

    values: Tensor
    features: Tensor
    metric: Tensor | None = None
    _: KW_ONLY
    ids: Sequence[Id]
    weight: float
    target_curvature: str = "given"
    damping: str | float | None = None
    reduction: str = "sum"
    formula: str = FORMULA

    def __post_init__(self) -> None:
        check_weight("Interactions", self.weight)
        factors = Factors.checked("Interactions", self.values, self.features, self.metric, self.ids)
        for field in ("values", "features", "metric"):
            object.__setattr__(self, field, getattr(factors, field))
        object.__setattr__(self, "ids", tuple(factors.ids))

    @classmethod
    def from_scores(
        cls,
        scores: Tensor | ScoreMatrix,
        weight: float | None = None,
        curvature_scores: Tensor | ScoreMatrix | None = None,
        ids: Sequence[Id] | None = None,
        *,
        shares: Tensor | None = None,
        target_curvature: str | None = None,
    ) -> Interactions:
        """Interactions in the full gradient space from influence scores alone; no gradient is kept.

        With H_f = (1/m) Σ_t ĝ_t ĝ_tᵀ, the Fisher of m target examples, K = P Pᵀ where P_it = u_iᵀ ĝ_t / √m is a
        scaled score; f is the mean loss of the target examples, so b_i = mean_t u_iᵀ g_t.

        Args:
            scores: g_tᵀ H⁻¹ g_i [m, n] of m target and n pool examples; > 0: adding i lowers the loss of t.
                A tensor, or labelled `Scores`, whose reduction and damping are then taken over.
            weight: Weight of one example: 1/n (as in the formula, the default), or 1/k for a model that will be
                trained on k selected examples alone.
            curvature_scores: ĝ_tᵀ H⁻¹ g_i [m', n] for target gradients under labels sampled from the model;
                None: the target's own labels (empirical Fisher), that is ``scores`` again.
            ids: Ids of the pool examples; those of ``scores`` by default, else column numbers.
            shares: Factor of each target example's loss in f, [m]; None for the mean, 1/m. Of the Fisher too, which is
                indefinite where one is negative; sampled labels need one draw for each target then.
            target_curvature: What to call H_f in the description.

        Raises:
            ValueError: If shapes or ids do not fit, the pool or the target is empty, a score is NaN or infinite, or
                no share is other than 0.
        """
        table = _table("scores", scores)
        fisher = table if curvature_scores is None else _table("curvature_scores", curvature_scores)
        names = _pool_ids(scores, table, ids)
        if curvature_scores is not None:
            _check_same_pool(scores, table, curvature_scores, fisher)
            _check_scores("curvature_scores", curvature_scores, fisher, names)
        _check_scores("scores", scores, table, names)
        weight = 1 / len(names) if weight is None else weight
        check_weight(_FROM_SCORES, weight)
        return cls(
            *_weighed(table, fisher, weight, shares),
            ids=names,
            weight=weight,
            target_curvature=target_curvature or f"{'empirical' if fisher is table else 'sampled'} Fisher",
            damping=getattr(scores, "damping", None),
            reduction=getattr(scores, "reduction", "sum"),
        )

    @classmethod
    def from_features(
        cls,
        features: Tensor,
        targets: Tensor,
        curvature_targets: Tensor | None = None,
        ids: Sequence[Id] | None = None,
        *,
        shares: Tensor | None = None,
        damping: str | float | None = None,
    ) -> Interactions:
        """Interactions of whitened gradients, at weight 1: what `NewtonGreedy` chooses by.

        With φ = (G + damping)^{-1/2} g and f the mean loss of the targets, b_i = φ_iᵀ mean_t φ_t, F = Φ and
        M = (1/m) Σ_t φ_t φ_tᵀ, the Fisher of the targets. Rows with more than n + m columns are first brought to as
        many, with the same inner products.

        Args:
            features: Φ [n, r] of the pool, from `InfluenceFunction.features` or from scores.
            targets: Φ_t [m, r] in the same basis.
            curvature_targets: Features of the targets under labels sampled from the model, [m', r]; None: the
                targets' own labels (empirical Fisher).
            ids: Ids of the pool examples; row numbers by default.
            shares: Factor of each target example's loss in f, [m]; None for the mean, 1/m. Of the Fisher too, which is
                indefinite where one is negative; sampled labels need one draw for each target then.
            damping: Of G, for the description.

        Raises:
            ValueError: If shapes or ids do not fit, a number is NaN or infinite, or no example has a gradient.
        """
        call = "Interactions.from_features"
        fisher = targets if curvature_targets is None else curvature_targets
        if any(rows.dim() != 2 or rows.shape[1:] != features.shape[1:] or not len(rows) for rows in (targets, fisher)):
            raise ValueError(
                f"`{call}(features={list(features.shape)}, targets={list(targets.shape)})`: "
                "expected [n, r] and [m, r], with m >= 1, in one basis."
            )
        if shares is not None and not shares.shape == targets.shape[:1] == fisher.shape[:1]:
            raise ValueError(
                f"`{call}(shares={list(shares.shape)})`: expected one for each of {len(targets)} targets, and as many "
                "curvature targets."
            )
        names = check_ids(call, ids, len(features))
        check_finite(
            call, "features", torch.cat([b.isfinite().all(dim=1) for b in torch.split(features, BLOCK)]), names
        )
        for argument, rows in (("targets", targets), ("curvature_targets", fisher)):
            check_finite(call, argument, rows.isfinite().all(dim=1), range(len(rows)), "target examples")
        m = len(targets)
        features, both = thinned(features, targets if curvature_targets is None else torch.cat([targets, fisher]))
        goals, fisher = both[:m].double(), (both if curvature_targets is None else both[m:]).double()
        factors = fisher.new_ones(m) / m if shares is None else shares.to(fisher)
        spread = fisher / len(fisher) if shares is None else fisher * factors[:, None]
        return cls(
            gram(features, (factors @ goals)[None])[:, 0],
            features,
            spread.T @ fisher,
            ids=names,
            weight=1.0,
            target_curvature=f"{'empirical' if curvature_targets is None else 'sampled'} Fisher",
            damping=damping,
        )

    def to(self, device: torch.device | str) -> Interactions:
        """The same on a device: what is computed of them is computed there."""
        metric = None if self.metric is None else self.metric.to(device)
        return replace(self, values=self.values.to(device), features=self.features.to(device), metric=metric)

    def __len__(self) -> int:
        return len(self._factors)

    def first_order(self, group: Iterable[Id]) -> float:
        """F(S) = ∇fᵀ U_S: predicted change of f when the group is removed, without interactions."""
        return self.estimate(group, interactions=False)

    def estimate(self, group: Iterable[Id], change: Change = "removal", interactions: bool = True) -> float:
        """Predicted change of f when the group is removed from, or added to, the training set.

        F+I: ±∇fᵀU_S + ½ U_Sᵀ H_f U_S, + for removal ([IA] section 3.1, eq. 7 and 8); F without the second term.
        Negative: f, a loss, falls.

        Raises:
            ValueError: If an id is not in the pool or stands in the group twice.
        """
        return float(self.estimates([group], change, interactions)[0])

    def estimates(
        self, groups: Iterable[Iterable[Id]], change: Change = "removal", interactions: bool = True
    ) -> Tensor:
        """`estimate` of each group, float64 [number of groups]."""
        check_change("Interactions.estimates", change)
        sign = 1.0 if change == "removal" else -1.0
        rows = [self._rows(group) for group in groups]
        first_order = torch.tensor([self.values[group].sum() for group in rows], dtype=torch.float64)
        if not interactions:
            return sign * first_order
        return sign * first_order + torch.tensor([self._half_square(group) for group in rows], dtype=torch.float64)

    def pairwise(self, rows: Iterable[Id], columns: Iterable[Id] | None = None) -> Tensor:
        """K_ij of the examples named by ``rows`` against those of ``columns`` (``rows`` again when None), float64.

        Summed over all pairs of a group, the diagonal included, it is U_Sᵀ H_f U_S.
        """
        left = self._rows(rows)
        right = left if columns is None else self._rows(columns)
        return self._factors.lift(self.features[left].double()) @ self.features[right].double().T

    def mean_interactions(self, labels: Iterable[Id]) -> ClassInteractions:
        """Mean K_ij over pairs of different examples, between classes or sources.

        Args:
            labels: Class or source of each example, in the order of ``ids``; all int or all str.

        Raises:
            ValueError: If there is not one label for each example.
        """
        return class_interactions(self._factors, labels)

    def spectrum(self) -> Spectrum:
        """Eigenvalues of K, from its factors: how many directions the interactions of the pool really have."""
        return spectrum_of(self._factors)

    def reweighted(self, weight: float) -> Interactions:
        """The same examples at another weight: first-order values grow with it, interactions with its square.

        Raises:
            ValueError: If the weight is not a number > 0.
        """
        check_weight("Interactions.reweighted", weight)
        factor = weight / self.weight
        return replace(self, values=factor * self.values, features=factor * self.features, weight=weight)

    def select(self, rule: Rule[Picks], budget: Any, constraints: Any = None) -> Picks:
        """Lets a selection rule choose ``budget`` of these examples, minimising the addition estimate.

        Args:
            rule: As `InteractionGreedy()`.
            budget: Number of examples, share of them, or `TokenBudget`.
            constraints: `Constraints` that the selection must keep to besides.
        """
        parts = (self.values, self.features, self.metric)
        return rule.select(*parts, budget=budget, ids=self._factors.ids, constraints=constraints)

    @cached_property
    def _factors(self) -> Factors:
        return Factors(self.values, self.features, self.metric, tuple(self.ids))

    def _half_square(self, rows: list[int]) -> float:
        shift = self._factors.shift(rows)
        return 0.5 * float(shift @ self._factors.lift(shift))

    def _rows(self, group: Iterable[Id]) -> list[int]:
        return rows_of("Interactions", group, self._factors.rows)


def _table(argument: str, scores: Tensor | ScoreMatrix) -> Tensor:
    """Scores [m, n] of at least float32."""
    table = (scores if isinstance(scores, Tensor) else scores.total()).detach()
    if table.dim() != 2 or 0 in table.shape or table.is_complex():
        raise ValueError(
            f"`{_FROM_SCORES}({argument})`: expected a real tensor [m, n] with m >= 1 target and n >= 1 pool "
            f"examples, summed over components. Got shape {list(table.shape)}."
        )
    return table.float() if table.element_size() < 4 else table


def _weighed(
    table: Tensor, fisher: Tensor, weight: float, shares: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """b [n] and P [n, m'], with the signs of the shares as metric if one is negative."""
    if shares is None:
        rows = (weight / math.sqrt(len(fisher)) * fisher.T).contiguous()
        return weight * table.mean(dim=0, dtype=torch.float64), rows, None
    if not shares.shape == table.shape[:1] == fisher.shape[:1] or not bool(shares.isfinite().all() and shares.any()):
        raise ValueError(
            f"`{_FROM_SCORES}(shares={list(shares.shape)})`: expected one finite number for each of {len(table)} "
            "targets, not all of them 0, and as many curvature scores."
        )
    factors = shares.to(table.device).double()
    counted = factors != 0
    rows = (fisher[counted] * (weight * factors[counted].abs().sqrt()).to(fisher)[:, None]).T.contiguous()
    signs = factors[counted].sign()
    return weight * (factors @ table.double()), rows, None if bool((signs > 0).all()) else torch.diag(signs)


def _pool_ids(scores: Tensor | ScoreMatrix, table: Tensor, ids: Iterable[Id] | None) -> tuple[Id, ...]:
    labels = None if isinstance(scores, Tensor) else scores.train_ids
    return check_ids(_FROM_SCORES, labels if ids is None else ids, table.shape[1])


def _check_same_pool(
    scores: Tensor | ScoreMatrix, table: Tensor, others: Tensor | ScoreMatrix, other_table: Tensor
) -> None:
    call = f"`{_FROM_SCORES}(curvature_scores)`"
    if table.shape[1] != other_table.shape[1]:
        raise ValueError(
            f"{call}: expected the pool of the scores, {table.shape[1]} columns. Got {other_table.shape[1]}."
        )
    if isinstance(scores, Tensor) or isinstance(others, Tensor):
        return
    for column, (one, other) in enumerate(zip(scores.train_ids, others.train_ids, strict=True)):
        if one != other:
            raise ValueError(
                f"{call}: expected the pool of the scores, the same ids in the same order. Column {column} is id "
                f"{other!r} there and {one!r} in the scores."
            )


def _check_scores(argument: str, scores: Tensor | ScoreMatrix, table: Tensor, names: tuple[Id, ...]) -> None:
    """A target example without any finite score is to blame itself; else the pool examples are."""
    finite = table.isfinite()
    targets = getattr(scores, "query_ids", range(len(table)))
    check_finite(_FROM_SCORES, argument, finite.any(dim=1), targets, "target examples")
    check_finite(_FROM_SCORES, argument, finite.all(dim=0), names, "pool examples")


def check_change(call: str, change: str) -> None:
    """Raises ValueError for anything but the two changes of a training set."""
    if change not in get_args(Change):
        raise ValueError(f"`{call}(change={change!r})`: expected 'removal' or 'addition'.")
