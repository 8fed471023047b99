"""The contract of a filter: the k rows that are most similar to each query."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Filter(ABC):
    """Searches a pool of ``n`` rows that is known from the start.

    Attributes:
        num_rows: ``n``.
    """

    num_rows: int

    @abstractmethod
    def similarities(self, query: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Similarity of one query to every row, ``[n]``: larger is more similar, the scale is the filter's own."""

    def candidates(self, queries: Sequence[Any], k: int, must_include: Sequence[int] | Tensor | None = None) -> Tensor:
        """The ``k`` best rows for each query, best first; among equals the lower index comes first.

        Args:
            queries: ``q`` queries.
            k: Rows for each query, 1 to ``n``.
            must_include: One row for each query, its true source say. Where it is not among the best it
                replaces the worst of them, at the last place ([SP] section 3.2).

        Returns:
            Indices of rows, int64 ``[q, k]``, unique within a query.

        Raises:
            ValueError: If ``k`` or a row in ``must_include`` is out of range.
        """
        self._check(queries, k, must_include)
        found = np.empty((len(queries), k), dtype=np.int64)
        for row, query in enumerate(queries):
            found[row] = np.argsort(-self.similarities(query), kind="stable")[:k]
            wanted = None if must_include is None else int(must_include[row])
            if wanted is not None and wanted not in found[row]:
                found[row, -1] = wanted
        return torch.from_numpy(found)

    def _check(self, queries: Sequence[Any], k: int, must_include: Sequence[int] | Tensor | None) -> None:
        n = self.num_rows
        if isinstance(queries, str):
            raise ValueError("`candidates(queries='...')`: expected a sequence of queries, got one string.")
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
            raise ValueError(f"`candidates(k={k!r})`: expected an int from 1 to the {n} rows of the pool.")
        if must_include is None:
            return
        if len(must_include) != len(queries):
            raise ValueError(
                f"`candidates(must_include=...)`: expected one row for each of {len(queries)} queries, "
                f"got {len(must_include)}."
            )
        outside = [int(row) for row in must_include if not 0 <= row < n]
        if outside:
            raise ValueError(f"`candidates(must_include=...)`: expected indices from 0 to {n - 1}, got {outside[:5]}.")
