"""Candidates by the direction of their word counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_influence.filters.base import Filter, largest
from lightning_influence.filters.words import Tokenizer, corpus_words, query_text, query_words, words


class TfidfFilter(Filter):
    """Cosine of TF-IDF vectors: counts of words times log((1 + n) / (1 + rows with the word)) + 1.

    The vectors are scikit-learn's. Words of a query that stand in no row are left out of its vector. A row
    without a word has similarity 0 to everything. Accumulated in float64.

    Args:
        corpus: The ``n`` rows of the pool as text.
        tokenizer: Text to a list of words; None takes lower-case words. The same is used for the queries.
        progress: Whether a long search shows a progress bar.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
        ValueError: If the corpus is empty, a row is not a string, or there is no word in any row.

    >>> pool = TfidfFilter(["the cat sat", "two plus two", "a dog ran", "one plus one", "go home"])
    >>> pool.candidates(["what is one plus one"], k=2)
    tensor([[3, 1]])
    """

    def __init__(self, corpus: Sequence[str], tokenizer: Tokenizer | None = None, *, progress: bool = True) -> None:
        self._tokenizer = tokenizer or words
        self.progress = progress
        self._vectorizer = _vectorizer()
        rows = corpus_words("TfidfFilter", corpus, self._tokenizer)
        self.num_rows = len(rows)
        vectors = self._vectorizer.fit_transform(rows)
        self._columns = vectors.T.tocsr()  # [v, n] by word, so that a query touches only the rows of its words

    def similarities(self, query: Any) -> NDArray[np.float64]:
        """Cosine of the rows with the query, ``[n]``, 0 to 1; 0 where no word is shared.

        Raises:
            ValueError: If the query is not a string.
        """
        vector = self._vectorizer.transform([self._tokenizer(query_text("TfidfFilter", query))])
        cosines: NDArray[np.float64] = self._cosines(vector)[0]
        return cosines

    def _prepare(self, queries: Sequence[Any]) -> Any:
        known = self._vectorizer.vocabulary_
        return self._vectorizer.transform(query_words("TfidfFilter", queries, self._tokenizer, known))

    def _best(self, prepared: Any, k: int) -> NDArray[np.int64]:
        return np.stack([largest(row, k) for row in self._cosines(prepared)])

    def _cosines(self, vectors: Any) -> NDArray[np.float64]:
        """Of sparse ``[b, v]``, as ``[b, n]``; a sum runs over the words in order, whatever other rows there are."""
        cosines: NDArray[np.float64] = (vectors @ self._columns).toarray()
        return cosines


def _vectorizer() -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`TfidfFilter` needs scikit-learn: pip install 'lightning-influence[text]'"
        ) from error
    return TfidfVectorizer(analyzer=_as_they_are, dtype=np.float64)


def _as_they_are(row: list[str]) -> list[str]:
    return row
