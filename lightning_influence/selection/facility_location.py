"""The rows that represent the pool: facility location."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.estimators.factors import Factors, Id
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.filling_rule import FillingRule
from lightning_influence.selection.row_data import checked_embeddings, unit_rows

ELEMENTS = 2**23  # similarities at once: 64 MiB
BLOCK = 16  # rows whose gain is brought up to date together


@dataclass(frozen=True, eq=False)
class FacilityLocation(FillingRule):
    """Greedy on Σ_i max_{j∈S} s_ij, with s_ij the cosine of rows i and j where it is positive, and 0 elsewhere.

    Adds the row that raises the sum most, k times; equal rows by id (what float64 cannot tell apart is equal). The sum
    has falling returns, so that a gain computed earlier bounds the present one, and only the rows that can still win
    are looked at again (Minoux 1978): the picks are those of the greedy that looks at all. Similarities are formed in
    blocks from the vectors, never all n² at once; the first pick takes n² d multiplications. Values only fill in the
    predicted gains.

    >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [0.0, 1.0]])
    >>> FacilityLocation().select(torch.zeros(4), vectors, budget=2).ids
    (1, 3)

    Attributes:
        embeddings: [N, d], matched with the rows of the pool by id. None takes the features that `select` is given, as
            they are: a metric plays no part in the cosine.
        ids: Ids of the embeddings; None for positions.

    Raises:
        ValueError: If an argument does not fit; from `select`, if a row has no finite embedding (ids are named), or
            there are neither embeddings nor features.
    """

    embeddings: Any = field(default=None, repr=False)
    ids: Sequence[Id] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "embeddings", checked_embeddings("FacilityLocation", self.embeddings, self.ids))

    @property
    def known_rows(self) -> int:
        """Those of the embeddings, where they have no ids."""
        return len(self.embeddings) if self.ids is None and self.embeddings is not None else 0

    def _fill(self, pool: Factors, admission: Admission) -> None:
        by_id = pool.id_ranks.cpu().argsort()
        vectors = unit_rows(f"{self!r}.select", pool, self.embeddings, self.ids)
        shares = torch.ones(len(pool)).double() if admission.shares is None else admission.shares.cpu()[by_id]
        covered = vectors.new_zeros(len(vectors))  # max_{j∈S} s_ij of each row i
        bounds = _gains(vectors, covered, torch.arange(len(vectors))) / shares
        rounding = 64 * torch.finfo(torch.float64).eps * len(vectors) / float(shares.min())
        with tqdm(total=admission.most, desc="FacilityLocation", unit="row", delay=10, leave=False) as bar:
            while admission.more:
                left = admission.open.cpu()[by_id]
                current = torch.zeros_like(left)
                best = -torch.inf
                while len(stale := (left & ~current & (bounds >= best - rounding)).nonzero().flatten()):
                    rows = stale[bounds[stale].argsort(descending=True)[:BLOCK]]
                    bounds[rows] = _gains(vectors, covered, rows) / shares[rows]
                    current[rows] = True
                    best = max(best, float(bounds[rows].max()))
                pick = int((current & (bounds >= best - rounding)).nonzero()[0])
                if admission.take(int(by_id[pick])):
                    covered = torch.maximum(covered, vectors @ vectors[pick])
                    bar.update()


def _gains(vectors: Tensor, covered: Tensor, rows: Tensor) -> Tensor:
    """What each of some rows adds to the sum, [len(rows)]."""
    step = max(1, ELEMENTS // len(vectors))
    parts = [(vectors[part] @ vectors.mT - covered).clamp_min(0).sum(1) for part in rows.split(step)]  # type: ignore[no-untyped-call]
    return torch.cat(parts)
