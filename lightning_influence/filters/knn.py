"""Candidates by their place in an embedding space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.filters.base import Filter, largest
from lightning_influence.filters.embeddings import CHUNK, Array, embedded, embedding_function
from lightning_influence.filters.words import some

Metric = Literal["cosine", "dot", "euclidean"]


class KNNFilter(Filter):
    """The nearest neighbours of a query among embeddings of the rows, by exact search ([MS] section 4.3).

    The embedding is the user's; nothing is downloaded. Blocks of queries are compared with all rows by one matrix
    product in the precision of the embeddings. What its error bound leaves open is decided in float64 in a fixed
    order of summation: equal rows tie, and neither the other queries nor the order of the pool matter.

    Args:
        corpus: The ``n`` rows of the pool: texts, or whatever else ``embed`` takes; without ``embed`` their
            embeddings ``[n, d]``. A row that embeds to zero has cosine 0 with everything.
        embed: A list of rows to their embeddings ``[b, d]``, as an array or a tensor, or an object with such a
            method ``encode``, say a model of sentence-transformers. The same is used for the queries. None: the
            queries are vectors ``[q, d]`` too.
        metric: ``"cosine"``, ``"dot"``, or ``"euclidean"``, whose similarity is minus the distance.
        batch_size: Rows in a call of ``embed``.
        progress: Whether a long embedding or search shows a progress bar.

    Raises:
        ValueError: If the corpus is empty or one string, ``embed`` cannot be called, an embedding is not finite, or
            their number or shape is not as described.

    >>> pool = KNNFilter([[1.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    >>> pool.candidates([[0.1, 0.9]], k=2)
    tensor([[2, 1]])
    """

    def __init__(
        self,
        corpus: Sequence[Any] | Array | Tensor,
        embed: Any = None,
        *,
        metric: Metric = "cosine",
        batch_size: int = 256,
        progress: bool = True,
    ) -> None:
        _check_arguments(corpus, metric, batch_size)
        self._embed = embedding_function(embed)
        self.metric = metric
        self.batch_size = batch_size
        self.progress = progress
        self._rows, self._norms = embedded("KNNFilter(corpus)", corpus, self._embed, batch_size, progress)
        self.num_rows = len(self._rows)

    def similarities(self, query: Any) -> NDArray[np.float64]:
        """Similarity of the rows with the query, ``[n]``, in the metric, accumulated in float64.

        Raises:
            ValueError: If the query's embedding is not finite or not of the rows' width.
        """
        [vector] = self._embedded("KNNFilter.similarities(query)", [query])
        step = max(1, CHUNK // len(vector))
        return np.concatenate([self._exact(vector, slice(k, k + step)) for k in range(0, self.num_rows, step)])

    def _prepare(self, queries: Sequence[Any]) -> NDArray[np.float64]:
        call = "KNNFilter.candidates(queries)"
        blank = [k for k, query in enumerate(queries) if isinstance(query, str) and not query.strip()]
        if blank:
            raise ValueError(f"`{call}`: expected text in every query, none in {some('query', blank)}. Leave them out.")
        vectors = self._embedded(call, queries)
        zero = np.flatnonzero(~vectors.any(axis=1)).tolist()
        if zero and self.metric != "euclidean":
            raise ValueError(
                f"`{call}`: expected embeddings other than zero, got zero for {some('query', zero)}. Leave them out: "
                "every row is equally similar to them."
            )
        return vectors

    def _embedded(self, call: str, queries: Any) -> NDArray[np.float64]:
        vectors, _ = embedded(call, queries, self._embed, self.batch_size, self.progress)
        d = self._rows.shape[1]
        if vectors.shape[1] != d:
            raise ValueError(f"`{call}`: expected embeddings of the rows' width {d}, got {vectors.shape[1]}.")
        return vectors.astype(np.float64)

    def _best(self, prepared: NDArray[np.float64], k: int) -> NDArray[np.int64]:
        found = np.empty((len(prepared), k), dtype=np.int64)
        for row, (query, rough, error) in enumerate(zip(prepared, *self._rough(prepared), strict=True)):
            last = np.partition(rough, self.num_rows - k)[self.num_rows - k]
            near = np.flatnonzero(rough >= last - 2 * error)  # what the k best must be among
            found[row] = near[largest(self._exact(query, near), k)]
        return found

    def _rough(self, queries: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Numbers ``[b, n]`` that order the rows as the similarity does, but for errors of at most ``[b]``.

        They are ⟨q, x⟩ / |q| over |x| for the cosine, as it is for the dot product, and ⟨q, x⟩ - |x|² / 2 for the
        distance. The error of a sum of d products is at most d units in the last place of |q| |x|, and d of the
        smallest number where products underflow; `_exact` has the same bound in float64.
        """
        lengths = np.sqrt((queries**2).sum(axis=1))
        units = queries / np.where(lengths > 0, lengths, 1.0)[:, None]
        rough = (units.astype(self._rows.dtype) @ self._rows.T).astype(np.float64)
        limits, d = np.finfo(self._rows.dtype), self._rows.shape[1] + 8
        largest_norm, underflow = self._norms.max(), d * float(limits.smallest_subnormal)
        if self.metric == "cosine":
            present = self._norms > 0
            np.divide(rough, self._norms, out=rough, where=present)
            error = d * limits.eps + underflow / self._norms[present].min(initial=1.0)
            return rough, np.full(len(queries), error)
        if self.metric == "dot":
            return rough, np.full(len(queries), d * limits.eps * largest_norm + underflow)
        rough = rough * lengths[:, None] - self._norms**2 / 2
        return rough, d * limits.eps * (lengths + largest_norm) ** 2 + underflow * lengths

    def _exact(self, query: NDArray[np.float64], which: Any) -> NDArray[np.float64]:
        """Similarities of some rows. Each is a sum over contiguous numbers, the same whichever rows are asked for."""
        rows = self._rows[which].astype(np.float64)
        if self.metric == "euclidean":
            distances: NDArray[np.float64] = np.sqrt(((rows - query) ** 2).sum(axis=1))
            return -distances
        products: NDArray[np.float64] = (rows * query).sum(axis=1)
        if self.metric == "dot":
            return products
        norms = self._norms[which] * np.sqrt((query**2).sum())
        cosines = np.zeros_like(products)
        np.divide(products, norms, out=cosines, where=norms > 0)
        return cosines


def _check_arguments(corpus: Any, metric: Any, batch_size: Any) -> None:
    if isinstance(corpus, str) or len(corpus) == 0:
        raise ValueError("`KNNFilter(corpus)`: expected a non-empty sequence of rows, or their embeddings [n, d].")
    if metric not in get_args(Metric):
        raise ValueError(f"`KNNFilter(metric={metric!r})`: expected one of {list(get_args(Metric))}.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`KNNFilter(batch_size={batch_size!r})`: expected an int >= 1.")
