"""Greedy selection on the interaction-aware influence of the whole group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.greedy_plain import plain_fill
from lightning_influence.selection.greedy_quickest import quickest_fill
from lightning_influence.selection.greedy_rule import GreedyRule
from lightning_influence.selection.greedy_search import GreedySearch


@dataclass(frozen=True, repr=False)
class InteractionGreedy(GreedyRule):
    """Adds, k times, the row that lowers the predicted target loss most, given the rows already chosen.

    Algorithm 1 of [IA] section 3.2 with its marginal score (eq. 12)

        Δ(j | S) = −b_j + ⟨U_S, w_j⟩ + q_j,    w_j = M f_j,  q_j = ½ f_jᵀ w_j,  U_S = Σ_{i∈S} f_i,

    exactly, in one of two ways that make the same picks. By default the quicker one is found out while it runs:

    - "pruned" predicts many picks, passes once over the rows that may win or tie at any of them, which lower bounds
      tell, and takes the picks that this proves (`GreedySearch`). Nothing is assumed about M or about the gains.
    - "plain" evaluates every remaining row for every pick, in O(k·n·r) time. Gains per cost are always taken so.

    Scores that decide are accumulated in float64. Two rows whose scores float64 cannot tell apart (their rounding
    errors overlap) are tied, and the smaller id wins. All k rows are picked even when late ones are predicted to raise
    the loss: read the gains. Besides the features, which may be float16 and a memory map, about a tenth of their
    memory is used. A progress bar appears after five seconds.

    >>> import torch
    >>> twins_and_a_loner = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> InteractionGreedy().select(torch.tensor([2.0, 2.0, 1.5]), twins_and_a_loner, budget=2).ids
    (0, 2)

    Attributes:
        method: "auto", "pruned" or "plain".

    Raises:
        ValueError: If the method is none of these; from `select`, if there are no features.
    """

    method: Literal["auto", "pruned", "plain"] = "auto"

    def __post_init__(self) -> None:
        if self.method not in ("auto", "pruned", "plain"):
            raise ValueError(f"`InteractionGreedy(method={self.method!r})`: expected 'auto', 'pruned' or 'plain'.")

    def __repr__(self) -> str:
        return f"InteractionGreedy({'' if self.method == 'auto' else f'method={self.method!r}'})"

    def _taken(self, pool: Factors, admission: Admission) -> Iterator[int]:
        if self.method == "plain" or admission.shares is not None:
            return plain_fill(pool, admission)
        if self.method == "pruned":
            return GreedySearch(pool, pool.id_ranks).fill(admission)
        return quickest_fill(pool, admission)
