"""Greedy selection on the interaction-aware influence of the whole group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.base import SelectionRule

_ROUNDING = 64 * torch.finfo(torch.float64).eps  # what a product of a few thousand terms may be off
_LONG = 2e10  # multiplications, about ten seconds on one core


@dataclass(frozen=True)
class InteractionGreedy(SelectionRule):
    """Adds, k times, the row that lowers the predicted target loss most, given the rows already chosen.

    Algorithm 1 of [IA] section 3.2 with its marginal score (eq. 12)

        Δ(j | S) = −b_j + ⟨U_S, w_j⟩ + q_j,    w_j = M f_j,  q_j = ½ f_jᵀ w_j,  U_S = Σ_{i∈S} f_i,

    exactly: every remaining row is evaluated for every pick, in O(k·n·r) time. ⟨U_S, w_j⟩ is taken as ⟨M U_S, f_j⟩,
    so that besides the features, which may be float32 or smaller, only a few vectors [n] are held. Scores are
    accumulated in float64. Two rows whose scores float64 cannot tell apart (their rounding errors overlap) are tied,
    and the smaller id wins. All k rows are picked even when late ones are predicted to raise the loss: read the
    gains.

    A progress bar appears when the run will take more than about ten seconds.

    >>> import torch
    >>> twins_and_a_loner = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> InteractionGreedy().select(torch.tensor([2.0, 2.0, 1.5]), twins_and_a_loner, budget=2).ids
    (0, 2)

    Raises:
        ValueError: From `select`, if there are no features.
    """

    def _pick(self, pool: Factors, budget: int) -> Sequence[int]:
        if pool.features is None:
            raise ValueError(
                f"`{self!r}.select(features=None)`: expected features [n, r] with the interactions K = F M Fᵀ. "
                "Use `TopK()` to select by the values alone."
            )
        norms = pool.norms()
        size = 1.0 if pool.metric is None else float(pool.metric.norm())
        alone = 0.5 * pool.self_interactions() - pool.values  # q_j − b_j; infinite once j is picked
        errors = pool.values.abs() + 0.5 * size * norms.square()
        chosen = pool.shift([])
        picks: list[int] = []
        work = float(budget) * pool.features.numel()
        for _ in tqdm(range(budget), desc="InteractionGreedy", unit="row", disable=work < _LONG, leave=False):
            direction = pool.lift(chosen)
            scores = alone + pool.products(direction)
            pick = _smallest(scores, _ROUNDING * (errors + norms * direction.norm()), pool.id_ranks)
            picks.append(pick)
            alone[pick] = torch.inf
            chosen = chosen + pool.shift([pick])
        return picks


def _smallest(scores: Tensor, errors: Tensor, ranks: Tensor) -> int:
    """Row of the smallest score; of the smallest rank among those that may be the smallest within their errors."""
    tied = (scores - errors <= (scores + errors).min()).nonzero().flatten()
    return int(tied[ranks[tied].argmin()])
