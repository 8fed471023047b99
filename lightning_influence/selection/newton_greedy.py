"""Greedy selection on the Newton step of a model that is trained on the selection alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.estimators.factors import Factors, Id, check_finite
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.filling_rule import FillingRule
from lightning_influence.selection.row_data import places

_ROUNDING = 64 * torch.finfo(torch.float64).eps  # what a product of a few thousand terms may be off
_COLUMNS = 1024  # room for so many picks at first
_LONG = 2e10  # multiplications, about ten seconds on one core


@dataclass(frozen=True, eq=False)
class NewtonGreedy(FillingRule):
    """Adds, k times, the row after which one Newton step on the rows chosen so far lowers the target loss most.

    Interactions ([IA] section 3.2) ask what small weights of the chosen rows add to the training objective. Here the
    model is trained on the chosen rows S alone, and is held near the reference by the curvature C of the data it
    comes from. Features are whitened gradients, φ_i = C^{-1/2} g_i; the curvature of S is its empirical Fisher. Then
    the parameters move by −C^{-1/2} w, and the target loss changes by J(S), with

        w = Φ_Sᵀ α,   α = (μ I + Φ_S Φ_Sᵀ)⁻¹ 1,   J(S) = −b̄ᵀw + ½ wᵀ M w,   b_j = b̄ᵀφ_j,

    b̄ the mean whitened gradient of the target and M its curvature in the same basis. With the empirical Fisher of m
    targets J(S) is (1/2m) ‖1 − Φ_t w‖² − ½: kernel ridge regression of the constant 1 on whitened gradients. A row
    that repeats others hardly moves w; one whose gradient opposes theirs, such as a wrong label, moves it the wrong
    way.

    Every remaining row is tried for every pick, in O(r) time: from the posterior kernel P = (I + Φ_SᵀΦ_S / μ)⁻¹ of the
    rows chosen, of which one vector [r] a pick is kept, follow all φ_jᵀPφ_j, wᵀφ_j and the two parts of J in two
    products with the features. No n × n or n × m matrix is formed. Numbers are accumulated in float64; rows whose
    gains float64 cannot tell apart are tied, and the smaller id wins. All k rows are picked even when late ones are
    predicted to raise the loss: read the gains. The choice is greedy and comes without a certificate.

    Features must be whitened gradients here (`Interactions.from_features`), for Φ Φᵀ is what the rows do to each
    other; those of `Interactions.from_scores` are not.

    Where features are short of the gradients, as `score_features` are, rows look more alike than they are. With
    ``unseen``, the squared length that is missing, each row has a direction of its own for it, orthogonal to all
    others: Φ_S Φ_Sᵀ gets it on its diagonal, as if μ were larger by it for that row. (Snelson and Ghahramani 2006 do
    so with Gaussian processes on a few inducing points.)

    Attributes:
        ridge: μ as a share of the mean ‖φ_j‖² of the pool, the unseen part included, the same for every pick. A row
            has the weight 1/μ against the hold on the reference; with a hold of λ on the mean loss of k rows it is
            k λ. It says how far training fits a row: training for long, as for small selections, asks for a small
            one.
        unseen: Squared length [N] of each row's gradient that its features leave out, >= 0, matched with the rows of
            the pool by id; None for whole features.
        ids: Ids of ``unseen``; None for positions.

    >>> import torch
    >>> twins_and_a_loner = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> NewtonGreedy(ridge=0.1).select(torch.tensor([1.0, 1.0, 0.8]), twins_and_a_loner, budget=2).ids
    (0, 2)

    Raises:
        ValueError: If the ridge is not a finite number > 0, or an unseen part is negative; from `select`, if there are
            no features, or nothing is known of the unseen part of a row.
    """

    ridge: float = 0.1
    unseen: Any = field(default=None, repr=False)
    ids: Sequence[Id] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        number = isinstance(self.ridge, int | float) and not isinstance(self.ridge, bool)
        if not number or not 0 < self.ridge < math.inf:
            raise ValueError(f"`NewtonGreedy(ridge={self.ridge!r})`: expected a finite number > 0, such as 0.1.")
        object.__setattr__(self, "unseen", _checked_unseen(self.unseen, self.ids))

    @property
    def known_rows(self) -> int:
        """Those of the unseen part, where they have no ids."""
        return len(self.unseen) if self.ids is None and self.unseen is not None else 0

    def _fill(self, pool: Factors, admission: Admission) -> None:
        if pool.features is None:
            raise ValueError(
                f"`{self!r}.select(features=None)`: expected features [n, r], the whitened gradients of the pool. "
                "Use `TopK()` to select by the values alone."
            )
        state = _Posterior(pool, self._dampings(pool), admission.most)
        short = 2.0 * admission.most * pool.features.numel() < _LONG
        with tqdm(total=admission.most, desc="NewtonGreedy", unit="row", disable=short, leave=False) as bar:
            while admission.more:
                pick, gain = state.best(admission)
                if admission.take(pick, gain):
                    state.add(pick)
                    bar.update()

    def _parts(self, pool: Factors, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        if not rows:
            return pool.in_order(rows)
        assert pool.features is not None
        index = torch.tensor(rows, device=pool.values.device)
        chosen = Factors(pool.values[index], pool.features[index], pool.metric, tuple(pool.ids[row] for row in rows))
        state = _Posterior(chosen, self._dampings(pool)[index], len(rows))
        first_order, interaction = zip(*map(state.add, range(len(rows))), strict=True)
        return torch.stack(first_order), torch.stack(interaction)

    def _dampings(self, pool: Factors) -> Tensor:
        """What is added to ‖φ_j‖² [n]: μ and the row's unseen part."""
        unseen = torch.zeros_like(pool.values)
        if self.unseen is not None:
            known = range(len(self.unseen)) if self.ids is None else self.ids
            unseen = self.unseen[torch.tensor(places(f"{self!r}.select", pool.ids, known))].to(pool.values)
        mean = float((pool.norms().square() + unseen).mean())
        return unseen + (self.ridge * mean if mean > 0 else self.ridge)  # without any gradient there is no scale


def _checked_unseen(unseen: Any, ids: Sequence[Id] | None) -> Tensor | None:
    if unseen is None:
        return None
    found: Tensor = torch.as_tensor(unseen).detach()
    if found.dim() != 1 or found.is_complex() or (ids is not None and len(ids) != len(found)):
        raise ValueError(
            f"`NewtonGreedy(unseen)`: expected a number for each row [n]{'' if ids is None else f', n = {len(ids)}'}. "
            f"Got shape {list(found.shape)}."
        )
    names = range(len(found)) if ids is None else ids
    check_finite("NewtonGreedy", "unseen", found.isfinite(), names)
    if bool((found < 0).any()):
        raise ValueError(
            f"`NewtonGreedy(unseen)`: expected squared lengths >= 0, got {float(found.min()):g}. Rounding may turn 0 "
            "negative: clamp_min(0)."
        )
    return found


class _Posterior:
    """What the rows chosen so far leave of the others.

    For every row j: ``size`` φ_jᵀPφ_j, ``predicted`` wᵀφ_j, ``slope`` (b̄ − M w)ᵀPφ_j, ``bend`` φ_jᵀP M Pφ_j. Adding j
    moves w by c Pφ_j with c = (1 − wᵀφ_j) / (μ_j + φ_jᵀPφ_j), which changes J by −c · slope + ½ c² · bend.
    """

    def __init__(self, pool: Factors, dampings: Tensor, budget: int) -> None:
        self.pool, self.dampings = pool, dampings  # μ_j [n]
        self.norms = pool.norms()
        self.size, self.slope, self.bend = self.norms.square(), pool.values.clone(), pool.self_interactions()
        self.predicted = torch.zeros_like(self.slope)
        self.moved = pool.shift([])  # w
        self.columns = pool.values.new_zeros(min(budget, _COLUMNS), len(self.moved))  # Pφ_s / sqrt(μ_s + φ_sᵀPφ_s)
        self.chosen = 0
        self.spread = 1.0 if pool.metric is None else float(pool.metric.norm())

    def best(self, admission: Admission) -> tuple[int, float]:
        """The open row that lowers J most, and by how much; the smallest id among those rounding cannot tell apart."""
        steps = (1 - self.predicted) / (self.dampings + self.size)
        scores = -steps * self.slope + 0.5 * steps.square() * self.bend
        errors = admission.error_per_cost(self._errors(steps))
        weighed = -admission.per_cost(-scores)
        weighed[~admission.open] = torch.inf
        tied = (weighed - errors <= (weighed + errors).min()).nonzero().flatten()
        pick = int(tied[self.pool.id_ranks[tied].argmin()])
        return pick, float(scores[pick])

    def add(self, row: int) -> tuple[Tensor, Tensor]:
        """Adds a row and returns the two parts of what it does to J."""
        column = self._posterior(self.pool.shift([row]))
        curved = self._posterior(self.pool.lift(column))
        overlap, bent = self.pool.products(torch.stack([column, curved], dim=1)).unbind(1)
        whole = self.dampings[row] + overlap[row]
        step = (1 - self.predicted[row]) / whole
        slope, bend = self.slope[row].clone(), bent[row].clone()
        share = overlap / whole
        self.bend += share * (share * bend - 2 * bent)
        self.slope += share * (step * bend - slope) - step * bent
        self.predicted += step * overlap
        self.size -= share * overlap
        self.moved = self.moved + step * column
        if self.chosen == len(self.columns):
            self.columns = torch.cat([self.columns, torch.zeros_like(self.columns)])
        self.columns[self.chosen] = column / whole.sqrt()  # with P as it was then
        self.chosen += 1
        return -step * slope, 0.5 * step.square() * bend

    def _posterior(self, vector: Tensor) -> Tensor:
        """P applied to a vector [r]."""
        columns = self.columns[: self.chosen]
        left: Tensor = vector - torch.matmul(columns.T, columns @ vector)
        return left

    def _errors(self, steps: Tensor) -> Tensor:
        """What rounding may have done to the scores."""
        reach = self.norms * self.moved.norm()
        squares = self.norms.square()
        step_errors = (1 + reach + steps.abs() * squares) / (self.dampings + self.size)
        slope_errors = self.pool.values.abs() + self.spread * reach
        found: Tensor = (steps * self.bend - self.slope).abs() * step_errors
        found += steps.abs() * slope_errors + 0.5 * steps.square() * self.spread * squares
        return found * (_ROUNDING * math.sqrt(1 + self.chosen))
