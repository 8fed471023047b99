"""Algorithm 1 in rounds: a run of picks is predicted, then proven or corrected in one pass over what may still win."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.greedy_bounds import GreedyBounds, slices
from lightning_influence.selection.greedy_exchange import Alone, Exchange
from lightning_influence.selection.greedy_path import Candidates, Path, predict
from lightning_influence.selection.greedy_sweep import Sweep, sweep_dtype
from lightning_influence.selection.greedy_ties import ROUNDING, magnitudes, metric_size, smallest

_FIRST_STEPS, _MOST_STEPS = 8, 64  # picks predicted in a round
_FEWEST_CANDIDATES = 256  # rows among which the next picks are looked for
_CANDIDATE_SHARE = 192  # no more of them than one row in so many: half a per cent of the features
_EVALUATED_SHARE = 8  # nor, as prediction shall cost less than proof, than one in so many that had to be evaluated


@dataclass(frozen=True)
class Pick:
    """One pick: its position in the whole pool, b of the row, and its marginal score."""

    position: int
    value: float
    score: float


@dataclass(frozen=True)
class Seen:
    """Rows that a sweep has evaluated.

    Attributes:
        rows: Their numbers [e].
        steps: At which their scores were kept.
        lowest: Lower ends [e, steps] of these scores, float64.
    """

    rows: Tensor
    steps: list[int]
    lowest: Tensor


class GreedySearch:
    """The picks of Algorithm 1 ([IA] section 3.2) with most of its evaluations left out.

    Each round

    1. predicts the next m picks: the greedy choice among a few hundred rows with the best estimated scores. Their
       exact scores are upper limits on the winning scores along the predicted path;
    2. goes through all rows. A row whose lower bound (`GreedyBounds`) is above the limit at every step is left alone.
       The others are evaluated for all m steps in one matrix product, in float32 with a bound on its rounding error,
       and their bounds are renewed. Those that may win or tie at some step are evaluated in float64 (`Sweep`);
    3. takes the winner of every step, by float64 scores, ties by key, as the plain loop does, up to the first step
       whose winner is not the predicted one; that winner is taken too, the steps after it are void.

    At least one pick is made in every round, and nothing is assumed about M: prediction and bounds decide only how
    fast it goes.

    Args:
        pool: The rows of this process.
        keys: The order [n] in which ties are resolved, int64, unique in the whole pool.
        exchange: How ranks that share the pool talk.
    """

    def __init__(self, pool: Factors, keys: Tensor, exchange: Exchange | None = None) -> None:
        self._pool, self._keys = pool.with_scratch(), keys
        self._exchange = Alone() if exchange is None else exchange
        self._bounds = GreedyBounds(self._pool, _MOST_STEPS)
        self._alone = self._bounds.own.mul_(0.5).sub_(pool.values)  # q_j − b_j; infinite once j is picked
        self._size = metric_size(pool)
        assert pool.features is not None
        self._dtype = sweep_dtype(pool.features, float(self._bounds.norms.max()))
        self._total = pool.shift([])
        self._steps, self._evaluated = _FIRST_STEPS, 0
        self._most = min(max(len(pool) // _CANDIDATE_SHARE, _FEWEST_CANDIDATES), self._exchange.most_rows, len(pool))
        self._near = pool.features.new_empty(self._most, pool.features.shape[1])
        self._few = pool.values.new_empty(min(_FEWEST_CANDIDATES, self._most), pool.features.shape[1])
        for part in slices(0, len(pool)):
            rows = torch.arange(part.start, part.stop, device=keys.device)
            self._bounds.refresh(rows, self._alone[rows] - self._errors(rows), 0)

    def picks(self, budget: int) -> Iterator[Pick]:
        """The first ``budget`` picks, no more than there are rows in the whole pool."""
        while budget > 0:
            made = self._round(budget)
            yield from made
            budget -= len(made)

    def fill(self, admission: Admission) -> Iterator[int]:
        """Takes rows of an admission and gives out their numbers; for a process that holds the whole pool.

        A pick after which other rows may not be picked any more ends its round, for what was proven did not know of
        it. Such rows are out for good.
        """
        admission.take_first()
        for row in admission.picks:
            self._take(row, None)
            yield row
        self._drop(~admission.open)
        while admission.more:
            made = self._round(admission.most - len(admission.picks), admission)
            yield from (pick.position for pick in made)

    def _round(self, most: int, admission: Admission | None = None) -> list[Pick]:
        """The next picks, at least one unless the admission stops, and no more than ``most``."""
        path = self._predict(min(self._steps, most))
        found, seen = self._sweep(path)
        made = self._decide(path, found, admission)
        self._renew(path, seen, len(made))
        self._steps = min(_MOST_STEPS, max(2 * len(made), _FIRST_STEPS))
        return made

    def _errors(self, rows: Tensor) -> Tensor:
        """Rounding errors [rows] of q − b."""
        return ROUNDING * magnitudes(self._pool.values[rows], self._bounds.norms[rows].double(), self._size)

    def _predict(self, steps: int) -> Path:
        assert self._pool.features is not None
        direction = self._pool.lift(self._total)
        count = min(max(self._evaluated // _EVALUATED_SHARE, _FEWEST_CANDIDATES), self._most)
        count = int(self._exchange.agree(self._keys.new_tensor(count)))
        rows = self._bounds.lowest(direction, min(count, self._most))
        rows = rows[self._alone[rows].isfinite()]
        features = torch.index_select(self._pool.features, 0, rows, out=self._near[: len(rows)])
        if len(rows) <= len(self._few):  # more are converted a block at a time, for the memory
            features = self._few[: len(rows)].copy_(features)
        near = replace(self._pool, values=self._alone[rows], features=features, ids=range(len(rows)))
        scores = near.values + near.products(direction)
        candidates = Candidates(features, scores, self._errors(rows), self._keys[rows])
        return predict(self._pool, self._total, candidates.best(count, self._exchange), steps, self._exchange)

    def _sweep(self, path: Path) -> tuple[Tensor, Seen]:
        """Rows [e, 6] that may win or tie: step, position, key, b, score, error; of all ranks. And all evaluated."""
        bounds = self._bounds
        table = bounds.table(path.directions[:-1])
        alive = bounds.rows_below(table, path.limits)
        self._evaluated = len(alive)
        sweep = Sweep(self._pool, path, self._alone, self._keys, self._dtype, len(alive))
        lowest = self._alone.new_empty(len(alive), len(sweep.kept_steps))
        for start in range(0, len(alive), sweep.rows_at_a_time):
            part = slice(start, start + sweep.rows_at_a_time)
            lowest[part] = sweep.evaluate(alive[part], bounds.upper_norms(alive[part]), self._errors(alive[part]))
        found = sweep.found()
        found[:, 1] += self._exchange.offset
        return self._exchange.gather(found), Seen(alive, sweep.kept_steps, lowest)

    def _renew(self, path: Path, seen: Seen, made: int) -> None:
        """Takes in the scores at the kept step nearest to where U is now, of those that all rows were seen at."""
        place = min(
            (place for place, step in enumerate(seen.steps) if made == len(path) or step < max(made, 1)),
            key=lambda place: abs(seen.steps[place] - made),
        )
        line = self._bounds.add_reference(path.directions[seen.steps[place]])
        for part in slices(0, len(seen.rows)):
            rows, lowest = seen.rows[part], seen.lowest[part, place]
            left = self._alone[rows].isfinite()  # what was picked stays out
            self._bounds.refresh(rows[left], lowest[left], line)

    def _decide(self, path: Path, found: Tensor, admission: Admission | None = None) -> list[Pick]:
        picks: list[Pick] = []
        for step in range(len(path)):
            here = found[found[:, 0] == step]
            _, position, key, value, score, _ = here[smallest(here[:, 4], here[:, 5], here[:, 2])].tolist()
            closings = 0 if admission is None else admission.closings
            if admission is None or admission.take(int(position)):
                picks.append(Pick(int(position), value, score))
                expected = key == float(path.keys[step])
                self._take(int(position), path.shifts[step] if expected else None)
            if admission is not None and admission.closings > closings:
                self._drop(~admission.open)
                break
            if not expected:
                break
        return picks

    def _drop(self, rows: Tensor) -> None:
        """Leaves rows [n], bool, out from now on."""
        self._alone[rows] = torch.inf
        self._bounds.drop(rows)

    def _take(self, position: int, shift: Tensor | None) -> None:
        """Adds a pick to U; its features are asked of the rank that has them where they are not known."""
        row = position - self._exchange.offset
        mine = 0 <= row < len(self._pool)
        if shift is None:
            own = self._pool.shift([row] if mine else [])
            shift = self._exchange.gather(own[None] if mine else own[None][:0])[0]
        self._total = self._total + shift
        if mine:
            self._alone[row] = torch.inf
            self._bounds.drop(row)
