from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from rank_bm25 import BM25Okapi
from torch.utils.data import DataLoader

from lightning_influence.capture import ExampleLoader
from lightning_influence.estimators.lexical import Lexical, search_name
from lightning_influence.filters import BM25Filter, KNNFilter, TfidfFilter

POOL = [
    {"text": text} for text in ("the cat sat", "two plus two", "a dog ran", "one plus one", "go home now", "", "it")
]
QUERIES = [{"text": "what is one plus one"}, {"text": "the dog"}]


def lengths(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), text.count("o") + 1.0] for text in texts])


def test_similarities_are_those_of_rank_bm25() -> None:
    found = Lexical(BM25Filter, "text").score(QUERIES, POOL)
    index = BM25Okapi([row["text"].split() for row in POOL])
    expected = [index.get_scores(row["text"].split()) for row in QUERIES]
    assert found.values.tolist() == np.stack(expected).tolist()
    assert (found.query_ids, found.train_ids) == ((0, 1), tuple(range(7)))
    assert (found.formula, found.reduction) == ("similarity of texts by BM25Filter", "no loss")
    assert found.top(1)[0][0] == 3


@pytest.mark.parametrize("make", [BM25Filter, TfidfFilter, partial(KNNFilter, embed=lengths)])
def test_a_filter_may_be_made_or_handed_over(make: Any) -> None:
    texts = [row["text"] for row in POOL]
    expected = torch.tensor(np.stack([make(texts).similarities(row["text"]) for row in QUERIES]))
    for search in (make, make(texts)):
        found = Lexical(search, lambda row: row["text"]).score(DataLoader(QUERIES), DataLoader(POOL, batch_size=2))
        assert torch.equal(found.values, expected)
        assert found.formula.endswith(search_name(search))


def test_of_some_examples() -> None:
    """A filter that was handed over keeps its pool's frequencies; one that is made has those of the examples."""
    some = ExampleLoader(POOL, indices=[3, 0, 6])
    texts = [row["text"] for row in POOL]
    whole = Lexical(BM25Filter, "text").score(QUERIES, POOL).values
    kept = Lexical(BM25Filter(texts), "text").score(QUERIES, some)
    assert kept.train_ids == (3, 0, 6)
    assert torch.equal(kept.values, whole[:, [3, 0, 6]])
    own = Lexical(BM25Filter, "text").score(QUERIES, some)
    assert torch.equal(own.values, Lexical(BM25Filter, "text").score(QUERIES, [POOL[k] for k in (3, 0, 6)]).values)
    assert not torch.equal(own.values, kept.values)


def test_names() -> None:
    made = (BM25Filter, BM25Filter(["a"]), partial(BM25Filter, progress=False), lambda texts: BM25Filter(texts))
    assert [search_name(search) for search in made] == ["BM25Filter"] * 3 + ["<lambda>"]


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"`Lexical\(filter=str\)`: expected a Filter of the training data"):
        Lexical("bm25", "text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`Lexical\(text=3\)`: expected a field of the rows, or a function"):
        Lexical(BM25Filter, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"row 0 has the fields \['text'\] \(KeyError: 'body'\)"):
        Lexical(BM25Filter, "body").score(QUERIES, POOL)
    with pytest.raises(ValueError, match="row 0 is a int"):
        Lexical(BM25Filter, "text").score([1], POOL)
    with pytest.raises(ValueError, match="its pool has 2 rows, the training data 7"):
        Lexical(BM25Filter(["a", "b"]), "text").score(QUERIES, POOL)
    with pytest.raises(ValueError, match="the data is empty"):
        Lexical(BM25Filter, "text").score(QUERIES, [])
