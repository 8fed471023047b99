"""Text as words, the same for every filter that compares words."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Container, Sequence
from typing import Any

Tokenizer = Callable[[str], Sequence[str]]

WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case.

    >>> words("It's 3 o'clock.")
    ['it', 's', '3', 'o', 'clock']
    """
    return WORD.findall(text.lower())


def corpus_words(name: str, corpus: Sequence[str], tokenizer: Tokenizer) -> list[list[str]]:
    """The words of each row of a pool; rows without a word are legal, a pool without one is not.

    Args:
        name: Of the filter, for the errors.
        corpus: The ``n`` rows.
        tokenizer: Text to words.

    Raises:
        ValueError: If the corpus is empty, a row is not a string, or there is no word in any row.
    """
    if isinstance(corpus, str) or len(corpus) == 0:
        raise ValueError(f"`{name}(corpus)`: expected a non-empty sequence of strings, one for each row.")
    other = {index: type(row).__name__ for index, row in enumerate(corpus) if not isinstance(row, str)}
    if other:
        raise ValueError(
            f"`{name}(corpus)`: expected strings, got {dict(list(other.items())[:5])} (index: type) "
            f"and {len(other)} such rows in all. Pass the text field of your rows."
        )
    rows = [list(tokenizer(row)) for row in corpus]
    if not any(rows):
        raise ValueError(f"`{name}(corpus)`: expected words, none of the {len(rows)} rows has one.")
    return rows


def query_words(name: str, queries: Sequence[Any], tokenizer: Tokenizer, known: Container[str]) -> list[list[str]]:
    """The words of each query, for a search.

    A query without a word is as similar to every row as to any other: it is refused, since the order of the
    rows would decide. A query whose words stand in no row is no mistake of the caller's, and gets a warning.

    Args:
        name: Of the filter, for the errors.
        queries: The ``q`` queries.
        tokenizer: Text to words.
        known: The words of the pool.

    Raises:
        ValueError: If a query is not a string or has no word.
    """
    other = [index for index, query in enumerate(queries) if not isinstance(query, str)]
    if other:
        kind = type(queries[other[0]]).__name__
        raise ValueError(f"`{name}`: expected queries that are strings, got {kind} for {some('query', other)}.")
    found = [list(tokenizer(query)) for query in queries]
    empty = [index for index, query in enumerate(found) if not query]
    if empty:
        raise ValueError(
            f"`{name}.candidates(queries)`: expected a word in every query, none in {some('query', empty)}. "
            "Leave them out: every row is equally similar to them."
        )
    strange = [index for index, query in enumerate(found) if not any(word in known for word in query)]
    if strange:
        warnings.warn(
            f"`{name}.candidates(queries)`: no word of {some('query', strange)} stands in any row; the candidates "
            "are the first rows of the pool.",
            stacklevel=4,
        )
    return found


def query_text(name: str, query: Any) -> str:
    """The query itself.

    Raises:
        ValueError: If it is not a string.
    """
    if not isinstance(query, str):
        raise ValueError(f"`{name}`: expected queries that are strings, got {type(query).__name__}.")
    return query


def some(what: str, indices: Sequence[int], shown: int = 5) -> str:
    """The first of some indices, and how many there are.

    >>> some("query", [3, 8])
    'query 3, 8'
    >>> some("row", range(4, 99), shown=2)
    'row 4, 5, ... (95 in all)'
    """
    listed = ", ".join(map(str, indices[:shown]))
    return f"{what} {listed}" if len(indices) <= shown else f"{what} {listed}, ... ({len(indices)} in all)"
