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
from lightning_influence.selection.newton_posterior import Posterior, Shrinkage, newton_gains
from lightning_influence.selection.row_data import places

LONGEST = 32  # picks that are foreseen
NEAR = 64  # one row in so many is looked at for that, but no fewer than
FEWEST = 1024
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
    products with the features; those of up to 32 picks are taken in one pass over them. No n × n or n × m matrix is
    formed. Numbers are accumulated in float64; rows whose gains float64 cannot tell apart are tied, and the smaller id
    wins. All k rows are picked even when late ones are predicted to raise the loss: read the gains. The choice is
    greedy and comes without a certificate.

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
        search = _Search(pool, self._dampings(pool), admission)
        short = 2.0 * admission.most * pool.features.numel() < _LONG
        with tqdm(total=admission.most, desc="NewtonGreedy", unit="row", disable=short, leave=False) as bar:
            while admission.more:
                bar.update(search.run())

    def _parts(self, pool: Factors, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        if not rows:
            return pool.in_order(rows)
        assert pool.features is not None
        index = torch.tensor(rows, device=pool.values.device)
        return newton_gains(pool, index, self._dampings(pool)[index])

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


class _Search:
    """The greedy choice in runs: as many picks as can be foreseen for one pass over the features.

    1. The best row now, and the next ones as a few hundred rows that are near to it would have them, are foreseen; of
       each there are two vectors [r] that all other rows have to be multiplied with.
    2. One pass over the features multiplies by those of the whole run: as a product of matrices it is bound by
       arithmetic, where a pick by itself is bound by reading the features.
    3. All rows are brought up to date pick by pick and compared, as if nothing had been foreseen. The first pick that
       comes out otherwise ends the run, and the rest of the products is void.

    What is foreseen decides only how long a run lasts.
    """

    def __init__(self, pool: Factors, dampings: Tensor, admission: Admission) -> None:
        self.pool, self.admission = pool.with_scratch(), admission
        self.state, self.left = Posterior(self.pool, dampings), Shrinkage(pool.shift([]))
        self.length = 1

    def run(self) -> int:
        """Makes the next picks and says how many."""
        pick, gain, weighed = self.state.best(self.admission, self.admission.open)
        foreseen = self._foresee(pick, weighed)
        products = self._products(torch.cat([torch.stack(pair) for _, *pair in foreseen]))
        done = 0
        for (row, column, _), (overlap, bent) in zip(foreseen, products, strict=True):
            if done:
                pick, gain, _ = self.state.best(self.admission, self.admission.open)
            if pick != row or not self.admission.take(row, gain):
                break
            self.state.add(row, column, overlap, bent)
            done += 1
            if not self.admission.more:
                break
        self.left.keep(done)
        self.length = min(LONGEST, 2 * max(1, done))
        return done

    def _foresee(self, first: int, weighed: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """The next picks, each with Pφ and P M Pφ [r], as far as a part of the rows tells."""
        wanted = min(self.length, self.admission.most - len(self.admission.picks))
        near = max(FEWEST, len(weighed) // NEAR) if wanted > 1 else 1
        count = min(near, int(weighed.isfinite().sum()))
        rows = weighed.topk(count, largest=False).indices
        if not bool((rows == first).any()):  # as many others are tied with it
            rows[-1] = first
        assert self.pool.features is not None
        features = self.pool.features[rows].double()
        state, may = self.state.part(rows), torch.ones_like(rows, dtype=torch.bool)
        place, found = int((rows == first).nonzero()[0]), []
        while True:
            column = self.left(features[place])
            curved = self.left(self.pool.lift(column))
            found.append((int(rows[place]), column, curved))
            overlap, bent = (features @ torch.stack([column, curved], dim=1)).unbind(1)
            self.left.attempt(column[None] / (state.dampings[place] + overlap[place]).sqrt())
            may[place] = False
            if len(found) == wanted or not bool(may.any()):
                return found
            state.add(place, column, overlap, bent)
            place = state.best(self.admission, may, rows)[0]

    def _products(self, vectors: Tensor) -> Tensor:
        """Of all rows with vectors [2 t, r]: [t, 2, n]."""
        found, start = vectors.new_empty(len(vectors), len(self.pool)), 0
        for block in self.pool.blocks():
            found[:, start : start + len(block)] = vectors @ block.T
            start += len(block)
        return found.view(-1, 2, found.shape[1])
