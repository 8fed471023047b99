from __future__ import annotations

import pytest

from lightning_influence.filters import BM25Filter, TfidfFilter
from lightning_influence.filters.words import corpus_words, query_words, words

MEMBERS = [BM25Filter, TfidfFilter]


def test_case_and_punctuation_do_not_matter_by_default():
    assert words("Don't PANIC, über_all!") == ["don", "t", "panic", "über_all"]


def test_a_tokenizer_may_give_anything_that_can_be_listed():
    assert corpus_words("F", ["a b", ""], lambda text: iter(text.split())) == [["a", "b"], []]
    assert query_words("F", ["a b"], tuple, known={"a"}) == [["a", " ", "b"]]


@pytest.mark.parametrize("member", MEMBERS)
def test_words_that_stand_nowhere_are_told(member):
    pool = member(["a b", "c", "d"])
    with pytest.warns(
        UserWarning, match=rf"`{member.__name__}.candidates\(queries\)`: no word of query 1, 2 stands"
    ) as w:
        found = pool.candidates(["c", "x", "y z", "x c"], 2)
    assert found[:, 0].tolist() == [1, 0, 0, 1]
    assert found[1].tolist() == [0, 1]
    assert w[0].filename == __file__


@pytest.mark.parametrize("member", MEMBERS)
def test_similarities_of_nothing_are_nothing(member):
    pool = member(["a b", "c", "d"])
    assert pool.similarities("").tolist() == pool.similarities("x").tolist() == [0.0] * 3


@pytest.mark.parametrize("member", MEMBERS)
def test_many_wordless_queries_are_counted(member):
    with pytest.raises(ValueError, match=r"none in query 0, 1, 2, 3, 4, \.\.\. \(9 in all\)\. Leave them out"):
        member(["a", "b"]).candidates(["?!"] * 9, 1)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([], "expected a non-empty sequence of strings"),
        ("one string", "expected a non-empty sequence of strings"),
        (["a", 3, None], r"expected strings, got \{1: 'int', 2: 'NoneType'\} .* and 2 such rows in all"),
        (["", "..."], "expected words, none of the 2 rows has one"),
    ],
)
def test_a_corpus_that_is_none(member, corpus, message):
    with pytest.raises(ValueError, match=rf"`{member.__name__}\(corpus\)`: {message}"):
        member(corpus)


@pytest.mark.parametrize("member", MEMBERS)
def test_queries_that_are_none(member):
    pool = member(["a", "b"])
    with pytest.raises(ValueError, match=rf"`{member.__name__}`: expected .* strings, got dict for query 1, 3\."):
        pool.candidates(["a", {"text": "a"}, "b", None], 1)
    with pytest.raises(ValueError, match=rf"`{member.__name__}`: expected queries that are strings, got list\."):
        pool.similarities(["a"])
