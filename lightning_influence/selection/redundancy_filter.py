"""Score first, then skip what is too similar to what was taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_influence.estimators.factors import Factors, Id
from lightning_influence.selection.base import SelectionRule
from lightning_influence.selection.row_data import checked_embeddings, unit_rows

BLOCK = 512  # rows that are compared with the picks at once


@dataclass(frozen=True, eq=False)
class RedundancyFilter(SelectionRule):
    """Walks the rows by falling value, and skips one whose cosine with a row taken before exceeds the threshold.

    The filter of deita (Liu et al. 2024, section 3.4), where the value of a row is its quality and the vectors are
    embeddings. Rows of equal value by id; a row of zeros is like no other. It stops with an error where the rows that
    are different enough are fewer than the budget, and says how many they are.

    >>> import torch
    >>> vectors = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0]])
    >>> RedundancyFilter(0.9).select(torch.tensor([3.0, 2.0, 1.0]), vectors, budget=2).ids
    (0, 2)

    Attributes:
        threshold: Cosine in (-1, 1]; nothing is skipped at 1.
        embeddings: [N, d], matched with the rows of the pool by id. None takes the features that `select` is given, as
            they are: a metric plays no part in the cosine.
        ids: Ids of the embeddings; None for positions.

    Raises:
        ValueError: If an argument does not fit; from `select`, if a row has no finite embedding (ids are named), there
            are neither embeddings nor features, or too few rows are different enough.
    """

    threshold: float = 0.9
    embeddings: Any = field(default=None, repr=False)
    ids: Sequence[Id] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        given = self.threshold
        if isinstance(given, bool) or not isinstance(given, int | float) or not -1 < given <= 1:
            raise ValueError(f"`RedundancyFilter(threshold={given!r})`: expected a cosine in (-1, 1], such as 0.9.")
        object.__setattr__(self, "embeddings", checked_embeddings("RedundancyFilter", self.embeddings, self.ids))

    def _pick(self, pool: Factors, budget: int) -> Sequence[int]:
        by_id = pool.id_ranks.cpu().argsort()
        vectors = unit_rows(f"{self!r}.select", pool, self.embeddings, self.ids)
        picks: list[int] = []
        for rows in pool.values.cpu()[by_id].argsort(descending=True, stable=True).split(BLOCK):  # type: ignore[no-untyped-call]
            picks += self._kept(vectors, rows, picks)
            if len(picks) >= budget:
                found: list[int] = by_id[picks[:budget]].tolist()
                return found
        raise ValueError(
            f"`{self!r}.select(budget={budget})`: only {len(picks)} of {len(pool)} rows have no cosine above "
            f"{self.threshold} with a better one. Expected a budget of at most {len(picks)}, or a higher threshold."
        )

    def _kept(self, vectors: Tensor, rows: Tensor, picks: list[int]) -> list[int]:
        """Those of the next rows that are like no pick, and like none of them that is kept before."""
        block = vectors[rows]
        near = self._alike(block @ vectors[picks].mT).any(1).tolist() if picks else [False] * len(rows)
        alike = self._alike(block @ block.mT)
        kept: list[int] = []
        for k in range(len(rows)):
            if not near[k] and not bool(alike[k, kept].any()):
                kept.append(k)
        return [int(rows[k]) for k in kept]

    def _alike(self, cosines: Tensor) -> Tensor:
        return cosines.clamp_max(1) > self.threshold
