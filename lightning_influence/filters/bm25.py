"""Candidates by the words they share with the query."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rank_bm25 import BM25Okapi

from lightning_influence.filters.base import Filter

WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case.

    >>> words("It's 3 o'clock.")
    ['it', 's', '3', 'o', 'clock']
    """
    return WORD.findall(text.lower())


class BM25Filter(Filter):
    """Okapi BM25 over words, with the parameters of the package rank-bm25 (k1 = 1.5, b = 0.75).

    A word that stands in more than half of the rows counts a quarter of the mean inverse document frequency.
    In a pool of a handful of rows that mean can be negative, and shared words then speak against a row.

    Args:
        corpus: The ``n`` rows of the pool as text.
        tokenizer: Text to a list of words; None takes lower-case words. The same is used for the queries.

    Raises:
        ValueError: If the corpus is empty, a row is not a string, or there is no word in any row.

    >>> pool = BM25Filter(["the cat sat", "two plus two", "a dog ran", "one plus one", "go home"])
    >>> pool.candidates(["what is one plus one"], k=2)
    tensor([[3, 1]])
    """

    def __init__(self, corpus: Sequence[str], tokenizer: Callable[[str], list[str]] | None = None) -> None:
        if isinstance(corpus, str) or len(corpus) == 0:
            raise ValueError("`BM25Filter(corpus)`: expected a non-empty sequence of strings, one for each row.")
        other = {index: type(row).__name__ for index, row in enumerate(corpus) if not isinstance(row, str)}
        if other:
            raise ValueError(
                f"`BM25Filter(corpus)`: expected strings, got {dict(list(other.items())[:5])} (index: type) "
                f"and {len(other)} such rows in all. Pass the text field of your rows."
            )
        self.num_rows = len(corpus)
        self._tokenizer = tokenizer or words
        rows = [self._tokenizer(row) for row in corpus]
        if not any(rows):
            raise ValueError(f"`BM25Filter(corpus)`: expected words, none of the {len(rows)} rows has one.")
        self._index = BM25Okapi(rows)

    def similarities(self, query: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
        """BM25 of the rows for the words of the query, ``[n]``; 0 where no word is shared.

        Raises:
            ValueError: If the query is not a string.
        """
        if not isinstance(query, str):
            raise ValueError(f"`BM25Filter`: expected queries that are strings, got {type(query).__name__}.")
        return np.asarray(self._index.get_scores(self._tokenizer(query)), dtype=np.float64)
