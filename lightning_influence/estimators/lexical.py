"""Similarity of texts: the baseline that knows no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

from lightning_influence.capture import ExampleLoader
from lightning_influence.estimators.scores import Scores
from lightning_influence.filters.base import Filter

Text: TypeAlias = str | Callable[[Any], Any]
Search: TypeAlias = Filter | Callable[[list[Any]], Filter]


class Lexical:
    """Similarity of each query's text to each training example's, by BM25, TF-IDF or any other `Filter`.

    A baseline of [MS] section 5 in the call shape of an estimator; higher is more similar, and nothing is known of
    help or harm::

        Lexical(BM25Filter, text="text").score(queries, train)

    Args:
        filter: A filter whose pool is the training data, row by row; or what makes one of a list of texts, such as
            ``BM25Filter``, ``TfidfFilter`` or ``partial(KNNFilter, embed=encoder)``. It is then made of the examples
            that are scored, so that frequencies of words are those among them.
        text: The text of an example, or what else the filter takes: a field of the dataset's rows, or a function of
            a row.

    Raises:
        ValueError: If the filter is neither.
    """

    def __init__(self, filter: Search, text: Text) -> None:
        check_search("Lexical", filter, text)
        self.filter = filter
        self.text = text

    @property
    def formula(self) -> str:
        """What is computed, for the labels of the scores."""
        return f"similarity of texts by {search_name(self.filter)}"

    def score(self, queries: Any, train: Any) -> Scores:
        """Similarity of every training example to every query, float64 [q, n].

        Args:
            queries: Map-style dataset or DataLoader.
            train: Map-style dataset or DataLoader.

        Raises:
            ValueError: If the data is empty, a row has no such text, or the filter is of a pool of another size.
        """
        left, right = ExampleLoader(queries), ExampleLoader(train)
        asked = texts_of(left, self.text, "Lexical(text=...)")
        pool, columns = pool_for("Lexical", self.filter, self.text, right)
        rows = [pool.similarities(query)[columns] for query in asked]
        return Scores(
            values=torch.from_numpy(np.stack(rows)),
            query_ids=tuple(left.ids),
            train_ids=tuple(right.ids),
            formula=self.formula,
            reduction="no loss",
        )


def check_search(owner: str, search: Any, text: Any) -> None:
    """Refuse what cannot search, or cannot give a text.

    Raises:
        ValueError: Naming which.
    """
    if not isinstance(search, Filter) and not callable(search):
        raise ValueError(
            f"`{owner}(filter={type(search).__name__})`: expected a Filter of the training data, or what makes one of "
            "a list of texts, such as BM25Filter."
        )
    if not isinstance(text, str) and not callable(text):
        raise ValueError(f"`{owner}(text={text!r})`: expected a field of the rows, or a function of a row.")


def search_name(search: Search) -> str:
    """Name of the filter's class, or of what makes it."""
    if isinstance(search, Filter):
        return type(search).__name__
    made = getattr(search, "func", search)  # of a partial
    return str(getattr(made, "__name__", type(made).__name__))


def pool_for(owner: str, search: Search, text: Text, train: ExampleLoader) -> tuple[Filter, list[int]]:
    """The filter over the training examples, and the row of each of them in its pool.

    Raises:
        ValueError: If a filter that was handed over is of a pool of another size than the dataset.
    """
    if not isinstance(search, Filter):
        return search(texts_of(train, text, f"{owner}(text=...)")), list(range(train.num_examples))
    size = len(train.dataset)  # type: ignore[arg-type]
    if search.num_rows != size:
        raise ValueError(
            f"`{owner}(filter={type(search).__name__})`: its pool has {search.num_rows} rows, the training data "
            f"{size}. Expected a filter of the same rows in the same order, or the class, to have one made of them."
        )
    return search, list(train.ids)


def texts_of(examples: ExampleLoader, text: Text, call: str) -> list[Any]:
    """The text of every example, or what else a filter takes.

    Args:
        examples: Whose dataset is read.
        text: A field of the dataset's rows, or a function of a row.
        call: How the caller's code reads, for the error text.

    Raises:
        ValueError: If a row has no such field.
    """
    return [_text(k, examples.dataset[k], text, call) for k in examples.ids]


def _text(k: int, row: Any, text: Text, call: str) -> Any:
    try:
        return row[text] if isinstance(text, str) else text(row)
    except (LookupError, TypeError, AttributeError) as error:
        fields = f"has the fields {list(row)[:12]}" if isinstance(row, Mapping) else f"is a {type(row).__name__}"
        raise ValueError(
            f"`{call}`: expected a field of the rows, or a function of a row; row {k} {fields} "
            f"({type(error).__name__}: {error})."
        ) from error
