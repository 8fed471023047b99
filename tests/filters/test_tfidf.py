from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.filters.tfidf import TfidfFilter

DOCUMENTS = st.lists(st.lists(st.sampled_from("abcdef"), max_size=6), min_size=1, max_size=9).filter(any)


def cosines(documents, query):
    """Dense, word by word: count · (log((1 + n) / (1 + rows with the word)) + 1), then the cosine."""
    n, vocabulary = len(documents), sorted({word for document in documents for word in document})
    idf = {w: math.log((1 + n) / (1 + sum(w in document for document in documents))) + 1 for w in vocabulary}
    rows = np.array([[words.count(w) * idf[w] for w in vocabulary] for words in [*documents, query]])
    lengths = np.sqrt((rows**2).sum(axis=1))
    rows = rows / np.where(lengths > 0, lengths, 1.0)[:, None]
    return rows[:-1] @ rows[-1]


@given(documents=DOCUMENTS, query=st.lists(st.sampled_from("abcxyz"), max_size=5))
def test_similarities_are_cosines_of_tf_idf(documents, query):
    member = TfidfFilter([" ".join(document) for document in documents])
    np.testing.assert_allclose(member.similarities(" ".join(query)), cosines(documents, query), rtol=1e-12, atol=1e-15)


def test_a_text_is_most_like_itself():
    corpus = ["what is the capital of France", "what is the capital of Peru", "sum the numbers", "France, France!"]
    member = TfidfFilter(corpus)
    assert member.candidates(corpus, 1).flatten().tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose([member.similarities(text)[k] for k, text in enumerate(corpus)], 1.0, rtol=1e-15)


def test_one_letter_words_count():
    assert TfidfFilter(["x y", "z"]).similarities("y").tolist() == [pytest.approx(math.sqrt(0.5)), 0.0]


def test_own_tokenizer():
    corpus = ["A a", "b b", "c", "d"]
    assert TfidfFilter(corpus, tokenizer=str.split).similarities("a")[0] == pytest.approx(math.sqrt(0.5))
    assert TfidfFilter(corpus, tokenizer=str.split).similarities("aa").tolist() == [0.0] * 4
    assert TfidfFilter(corpus, tokenizer=list).similarities("A")[0] > 0


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs scikit-learn: pip install 'lightning-influence\[text\]'$"):
        TfidfFilter(["a", "b"])
