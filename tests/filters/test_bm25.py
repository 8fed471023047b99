from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

from lightning_influence.filters.bm25 import BM25Filter

DOCUMENTS = st.lists(st.lists(st.sampled_from("abcdef"), max_size=6), min_size=2, max_size=9).filter(any)


def okapi(documents, query, k1=1.5, b=0.75, epsilon=0.25):
    """BM25 word by word, as in the literature; frequent words get a share of the mean idf."""
    n, mean_length = len(documents), sum(map(len, documents)) / len(documents)
    vocabulary = {word for document in documents for word in document}
    containing = {word: sum(word in document for document in documents) for word in vocabulary}
    idf = {word: math.log((n - f + 0.5) / (f + 0.5)) for word, f in containing.items()}
    floor = epsilon * sum(idf.values()) / len(idf)
    scores = []
    for document in documents:
        length = k1 * (1 - b + b * len(document) / mean_length)
        counts = [(idf[word], document.count(word)) for word in query if word in vocabulary]
        scores.append(sum((w if w >= 0 else floor) * f * (k1 + 1) / (f + length) for w, f in counts))
    return scores


@given(documents=DOCUMENTS, query=st.lists(st.sampled_from("abcxyz"), max_size=5))
def test_similarities_are_okapi(documents, query):
    member = BM25Filter([" ".join(document) for document in documents])
    np.testing.assert_allclose(member.similarities(" ".join(query)), okapi(documents, query), rtol=1e-9, atol=1e-12)


@given(documents=DOCUMENTS, query=st.lists(st.sampled_from("abcxyz"), max_size=5))
def test_similarities_are_those_of_rank_bm25_to_the_last_bit(documents, query):
    member = BM25Filter([" ".join(document) for document in documents])
    assert member.similarities(" ".join(query)).tolist() == BM25Okapi(documents).get_scores(query).tolist()


def test_a_paraphrase_finds_its_source():
    corpus = [
        "How do I bake sourdough bread at home?",
        "Explain the rules of chess to a child.",
        "Write a poem about autumn leaves.",
        "What is the capital of France?",
        "Sum the numbers from one to ten.",
    ]
    queries = ["tell me which city is the capital of france", "baking BREAD at home, sourdough please"]
    assert BM25Filter(corpus).candidates(queries, k=1).flatten().tolist() == [3, 0]


def test_own_tokenizer():
    corpus = ["A a", "b b", "c", "d"]
    assert BM25Filter(corpus, tokenizer=str.split).similarities("a")[0] > 0
    assert BM25Filter(corpus, tokenizer=list).similarities("A")[0] > 0
    assert BM25Filter(corpus, tokenizer=str.split).similarities("aa").tolist() == [0.0] * 4


def test_a_row_without_words_is_last_resort():
    member = BM25Filter(["", "x y", "z", "w"])
    assert member.similarities("x")[0] == 0.0
    assert member.candidates(["x"], 1).item() == 1


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([], "expected a non-empty sequence of strings"),
        ("one string", "expected a non-empty sequence of strings"),
        (["a", 3, None], r"expected strings, got \{1: 'int', 2: 'NoneType'\} .* and 2 such rows in all"),
        (["", "..."], "expected words, none of the 2 rows has one"),
    ],
)
def test_a_corpus_that_is_none(corpus, message):
    with pytest.raises(ValueError, match=rf"`BM25Filter\(corpus\)`: {message}"):
        BM25Filter(corpus)


def test_a_query_that_is_none():
    with pytest.raises(ValueError, match="expected queries that are strings, got dict"):
        BM25Filter(["a", "b"]).candidates([{"text": "a"}], 1)
