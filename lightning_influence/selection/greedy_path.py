"""Which picks a greedy choice will make next: a guess with exact scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.greedy_exchange import Alone, Exchange
from lightning_influence.selection.greedy_ties import ROUNDING, metric_size, smallest


@dataclass(frozen=True)
class Candidates:
    """Rows among which the next picks are guessed; scores and errors in float64.

    Attributes:
        features: [c, r], float64 or the dtype of the pool's.
        scores: Marginal scores [c] at the present U.
        errors: Rounding errors [c] of q − b.
        keys: The order [c] in which ties are resolved.
    """

    features: Tensor
    scores: Tensor
    errors: Tensor
    keys: Tensor

    def best(self, count: int, exchange: Exchange) -> Candidates:
        """Those of all ranks, the ``count`` with the smallest scores if there are more; the same on every rank."""
        if isinstance(exchange, Alone) and len(self.keys) <= count:  # a per cent of the features: not copied
            return self
        features, scores, errors, keys = (
            exchange.gather(part) for part in (self.features.double(), self.scores, self.errors, self.keys)
        )
        chosen = scores.argsort(stable=True)[:count]
        return Candidates(features[chosen], scores[chosen], errors[chosen], keys[chosen])


@dataclass(frozen=True)
class Path:
    """Predicted picks.

    Attributes:
        keys: Of the picks [m].
        shifts: Their features [m, r], float64.
        directions: M U [m + 1, r] before each pick and after the last, float64.
        limits: Upper ends [m] of the winning scores with their errors, float64.
        floors: Lower ends [m] of the scores of the predicted picks with their errors, float64.
    """

    keys: Tensor
    shifts: Tensor
    directions: Tensor
    limits: Tensor
    floors: Tensor

    def __len__(self) -> int:
        return len(self.keys)


def predict(pool: Factors, total: Tensor, candidates: Candidates, steps: int, exchange: Exchange) -> Path:
    """The greedy choice among a few candidates, from U = ``total`` [r]."""
    steps = min(steps, len(candidates.keys))
    places, limits, floors = exchange.agree(_simulate(pool, total, candidates, steps))
    picks = places.long()
    shifts = candidates.features[picks].double()
    directions = [pool.lift(total)]
    for shift in shifts:  # one after the other, as the plain loop does: sums in another order round differently
        total = total + shift
        directions.append(pool.lift(total))
    return Path(candidates.keys[picks], shifts, torch.stack(directions), limits, floors)


def _simulate(pool: Factors, total: Tensor, candidates: Candidates, steps: int) -> Tensor:
    """Places of the picks among the candidates and limits and floors of their scores [3, steps]."""
    scores = candidates.scores
    rows = replace(pool, values=scores, features=candidates.features, ids=range(len(scores)))
    norms, size = rows.norms(), metric_size(pool)
    reach = total.norm()  # with what is added, never below ‖U‖
    picks, ends = [], []
    for _ in range(steps):
        # 4: these scores are summed in another order than the plain ones
        errors = 4 * (candidates.errors + ROUNDING * size * reach * norms)
        pick = smallest(scores, errors, candidates.keys)
        picks.append(pick)
        ends.append(torch.stack([(scores + errors).min(), scores[pick] - errors[pick]]))
        scores = scores + rows.products(pool.lift(candidates.features[pick]))
        scores[pick] = torch.inf
        reach = reach + norms[pick]
    places = torch.tensor(picks, dtype=torch.float64, device=scores.device)
    return torch.cat([places[None], torch.stack(ends, dim=1)])
