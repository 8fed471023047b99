"""Greedy selection on the interaction-aware influence of the whole group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from tqdm.auto import tqdm

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.base import SelectionRule
from lightning_influence.selection.greedy_plain import plain_fill
from lightning_influence.selection.greedy_search import GreedySearch

_DELAY = 5.0  # seconds before a progress bar is shown


@dataclass(frozen=True, repr=False)
class InteractionGreedy(SelectionRule):
    """Adds, k times, the row that lowers the predicted target loss most, given the rows already chosen.

    Algorithm 1 of [IA] section 3.2 with its marginal score (eq. 12)

        Δ(j | S) = −b_j + ⟨U_S, w_j⟩ + q_j,    w_j = M f_j,  q_j = ½ f_jᵀ w_j,  U_S = Σ_{i∈S} f_i,

    exactly, in one of two ways that make the same picks:

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
        method: "pruned" or "plain".

    Raises:
        ValueError: If the method is neither; from `select`, if there are no features.
    """

    weighs_costs: ClassVar[bool] = True

    method: Literal["pruned", "plain"] = "pruned"

    def __post_init__(self) -> None:
        if self.method not in ("pruned", "plain"):
            raise ValueError(f"`InteractionGreedy(method={self.method!r})`: expected 'pruned' or 'plain'.")

    def __repr__(self) -> str:
        return f"InteractionGreedy({'' if self.method == 'pruned' else f'method={self.method!r}'})"

    def _pick(self, pool: Factors, budget: int) -> Sequence[int]:
        admission = Admission.of_rows(pool, budget)
        self._fill(pool, admission)
        return admission.picks

    def _fill(self, pool: Factors, admission: Admission) -> None:
        if pool.features is None:
            raise ValueError(
                f"`{self!r}.select(features=None)`: expected features [n, r] with the interactions K = F M Fᵀ. "
                "Use `TopK()` to select by the values alone."
            )
        pruned = self.method == "pruned" and admission.shares is None
        picks = GreedySearch(pool, pool.id_ranks).fill(admission) if pruned else plain_fill(pool, admission)
        with tqdm(total=admission.most, desc="InteractionGreedy", unit="row", delay=_DELAY, leave=False) as bar:
            for _ in picks:
                bar.update()
