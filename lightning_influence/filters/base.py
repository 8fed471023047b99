"""The contract of a filter: the k rows that are most similar to each query."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

_BLOCK = 2**23  # similarities that a search holds at once: 64 MiB in float64


class Filter(ABC):
    """Searches a pool of ``n`` rows that is known from the start.

    A member defines `similarities`. One that can do better for many queries than one by one also overrides
    `_prepare` and `_best`, with the same result.

    Attributes:
        num_rows: ``n``.
        progress: Whether a search of more than three seconds shows a progress bar.
    """

    num_rows: int
    progress: bool = True

    @abstractmethod
    def similarities(self, query: Any) -> NDArray[np.float64]:
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
            ValueError: If ``k`` or a row in ``must_include`` is out of range, or a query cannot be compared.
        """
        self._check(queries, k)
        wanted = None if must_include is None else self._wanted(must_include, len(queries))
        found = np.empty((len(queries), k), dtype=np.int64)
        if len(queries) > 0:
            self._search(self._prepare(queries), found)
        if wanted is not None:
            missing = (found != wanted[:, None]).all(axis=1)
            found[missing, -1] = wanted[missing]
        return torch.from_numpy(found)

    def _prepare(self, queries: Sequence[Any]) -> Any:
        """All queries, checked, in the form that `_best` compares: anything that can be sliced."""
        return queries

    def _best(self, prepared: Any, k: int) -> NDArray[np.int64]:
        """The ``k`` best rows for each of some prepared queries, ``[b, k]``."""
        return np.stack([largest(self.similarities(query), k) for query in prepared])

    def _search(self, prepared: Any, found: NDArray[np.int64]) -> None:
        q, k = found.shape
        block = max(1, _BLOCK // self.num_rows)
        with tqdm(total=q, desc="candidates", unit="query", delay=3, leave=False, disable=not self.progress) as bar:
            for start in range(0, q, block):
                stop = min(start + block, q)
                found[start:stop] = self._best(prepared[start:stop], k)
                bar.update(stop - start)

    def _check(self, queries: Sequence[Any], k: int) -> None:
        if isinstance(queries, str):
            raise ValueError("`candidates(queries='...')`: expected a sequence of queries, got one string.")
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.num_rows:
            raise ValueError(f"`candidates(k={k!r})`: expected an int from 1 to the {self.num_rows} rows of the pool.")

    def _wanted(self, must_include: Sequence[int] | Tensor, q: int) -> NDArray[np.int64]:
        n = self.num_rows
        wanted = must_include.cpu().numpy() if isinstance(must_include, Tensor) else np.asarray(must_include)
        if wanted.shape != (q,):
            got = len(wanted) if wanted.ndim == 1 else f"shape {list(wanted.shape)}"
            raise ValueError(f"`candidates(must_include=...)`: expected one row for each of {q} queries, got {got}.")
        if q > 0 and wanted.dtype.kind not in "iu":
            raise ValueError(f"`candidates(must_include=...)`: expected indices of rows, got {wanted.dtype}.")
        outside = [int(row) for row in wanted if not 0 <= row < n]
        if outside:
            raise ValueError(f"`candidates(must_include=...)`: expected indices from 0 to {n - 1}, got {outside[:5]}.")
        return wanted.astype(np.int64)


def largest(similarities: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Indices of the ``k`` largest of ``n`` numbers, largest first, among equals the lower index first, ``[k]``.

    Raises:
        ValueError: If a similarity is NaN, which has no place in an order.

    >>> largest(np.array([1.0, 3.0, 1.0, 2.0, 1.0]), k=4)
    array([1, 3, 0, 2])
    """
    unordered = np.flatnonzero(np.isnan(similarities))
    if len(unordered) > 0:
        raise ValueError(f"`similarities(query)`: expected numbers, got NaN for rows {unordered[:5].tolist()}.")
    n = len(similarities)
    last = np.partition(similarities, n - k)[n - k]
    above = np.flatnonzero(similarities > last)  # at most k - 1: only these need sorting
    above = above[np.argsort(-similarities[above], kind="stable")]
    return np.concatenate([above, np.flatnonzero(similarities == last)[: k - len(above)]])
