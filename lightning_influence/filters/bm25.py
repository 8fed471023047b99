"""Candidates by the words they share with the query, the rarer the better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rank_bm25 import BM25Okapi

from lightning_influence.filters.base import Filter, largest
from lightning_influence.filters.words import Tokenizer, corpus_words, query_text, query_words, words


class BM25Filter(Filter):
    """Okapi BM25 over words, with the parameters of the package rank-bm25 (k1 = 1.5, b = 0.75).

    A word that stands in more than half of the rows counts a quarter of the mean inverse document frequency.
    In a pool of a handful of rows that mean can be negative, and shared words then speak against a row.
    A row without a word has similarity 0 to everything.

    The numbers are those of rank-bm25 to the last bit. It looks at every row for every word of a query; here the
    part of each word in the score of each row that has it is written down once.

    Args:
        corpus: The ``n`` rows of the pool as text.
        tokenizer: Text to a list of words; None takes lower-case words. The same is used for the queries.
        progress: Whether a long search shows a progress bar.

    Raises:
        ValueError: If the corpus is empty, a row is not a string, or there is no word in any row.

    >>> pool = BM25Filter(["the cat sat", "two plus two", "a dog ran", "one plus one", "go home"])
    >>> pool.candidates(["what is one plus one"], k=2)
    tensor([[3, 1]])
    """

    def __init__(self, corpus: Sequence[str], tokenizer: Tokenizer | None = None, *, progress: bool = True) -> None:
        self._tokenizer = tokenizer or words
        self.progress = progress
        rows = corpus_words("BM25Filter", corpus, self._tokenizer)
        self.num_rows = len(rows)
        self._place, self._rows, self._parts = _postings(BM25Okapi(rows))

    def similarities(self, query: Any) -> NDArray[np.float64]:
        """BM25 of the rows for the words of the query, ``[n]``; 0 where no word is shared.

        Raises:
            ValueError: If the query is not a string.
        """
        return self._scores(self._tokenizer(query_text("BM25Filter", query)))

    def _prepare(self, queries: Sequence[Any]) -> list[list[str]]:
        return query_words("BM25Filter", queries, self._tokenizer, known=self._place)

    def _best(self, prepared: Sequence[Sequence[str]], k: int) -> NDArray[np.int64]:
        return np.stack([largest(self._scores(query), k) for query in prepared])

    def _scores(self, query: Iterable[str]) -> NDArray[np.float64]:
        """Summed in the order of the words, as rank-bm25 does; a repeated word counts again."""
        scores = np.zeros(self.num_rows)
        for word in query:
            if word in self._place:
                place = self._place[word]
                scores[self._rows[place]] += self._parts[place]
        return scores


def _postings(index: Any) -> tuple[dict[str, slice], NDArray[np.int64], NDArray[np.float64]]:
    """Where each word's entries are; the row of each entry, and the word's part in the score of that row."""
    number = {word: k for k, word in enumerate(index.idf)}
    sizes = [len(counts) for counts in index.doc_freqs]
    entries = sum(sizes)
    which = np.fromiter((number[w] for counts in index.doc_freqs for w in counts), dtype=np.int64, count=entries)
    freqs = np.fromiter(chain.from_iterable(c.values() for c in index.doc_freqs), dtype=np.int64, count=entries)
    order = np.argsort(which, kind="stable")
    which, freqs, rows = which[order], freqs[order], np.repeat(np.arange(len(sizes)), sizes)[order]
    idf = np.fromiter(index.idf.values(), dtype=np.float64, count=len(number))
    lengths = np.array(index.doc_len)[rows]
    # operation by operation as BM25Okapi.get_scores, so that rounding and with it ties are the same
    parts = idf[which] * (freqs * (index.k1 + 1) / (freqs + index.k1 * (1 - index.b + index.b * lengths / index.avgdl)))
    ends = np.cumsum(np.bincount(which, minlength=len(number))).tolist()
    place = {word: slice(start, end) for word, start, end in zip(number, [0, *ends], ends, strict=False)}
    return place, rows, parts
