"""Score first, then skip what is too similar to what was taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_influence.estimators.factors import Factors, Id
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.filling_rule import FillingRule
from lightning_influence.selection.row_data import checked_embeddings, unit_rows

BLOCK = 512  # rows that are compared with the picks at once


@dataclass(frozen=True, eq=False)
class RedundancyFilter(FillingRule):
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

    @property
    def known_rows(self) -> int:
        """Those of the embeddings, where they have no ids."""
        return len(self.embeddings) if self.ids is None and self.embeddings is not None else 0

    def _fill(self, pool: Factors, admission: Admission) -> None:
        by_id = pool.id_ranks.cpu().argsort()
        vectors = unit_rows(f"{self!r}.select", pool, self.embeddings, self.ids)
        admission.take_first()
        picks: list[int] = pool.id_ranks.cpu()[admission.picks].tolist()
        values = admission.per_cost(pool.values).cpu()[by_id]
        for places in values.argsort(descending=True, stable=True).split(BLOCK):  # type: ignore[no-untyped-call]
            if not admission.more:
                return
            picks += self._kept(vectors, places, picks, by_id[places].tolist(), admission)
        if admission.short:
            raise ValueError(
                f"`{self!r}.select(budget)`: only {len(picks)} of {len(pool)} rows have no cosine above "
                f"{self.threshold} with a better one. Expected a budget and minimums for at most {len(picks)} rows, "
                "or a higher threshold."
            )

    def _kept(
        self, vectors: Tensor, places: Tensor, picks: list[int], rows: list[int], admission: Admission
    ) -> list[int]:
        """Takes those of the next rows that are like no pick, and like none of them that is taken before."""
        block = vectors[places]
        near = self._alike(block @ vectors[picks].mT).any(1).tolist() if picks else [False] * len(rows)
        alike = self._alike(block @ block.mT)
        kept: list[int] = []
        for k, row in enumerate(rows):
            different = not near[k] and not bool(alike[k, kept].any())
            if different and admission.is_open(row) and admission.take(row):
                kept.append(k)
        return [int(places[k]) for k in kept]

    def _alike(self, cosines: Tensor) -> Tensor:
        return cosines.clamp_max(1) > self.threshold
