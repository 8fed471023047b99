from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.filters.base import Filter
from lightning_influence.filters.knn import KNNFilter

METRICS = ["cosine", "dot", "euclidean"]


def brute_force(rows, query, metric):
    """One row at a time in float64."""
    query = np.asarray(query, dtype=np.float64)
    found = []
    for row in np.asarray(rows, dtype=np.float64):
        if metric == "euclidean":
            found.append(-np.linalg.norm(row - query))
        else:
            length = np.linalg.norm(row) * np.linalg.norm(query) if metric == "cosine" else 1.0
            found.append(row @ query / length if length > 0 else 0.0)
    return np.array(found)


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


class Encoder:
    """As a model of sentence-transformers: callable, but with other arguments than `encode`."""

    def __init__(self):
        self.calls = []

    def __call__(self, features):
        raise AssertionError("expected a call of `encode`")

    def encode(self, sentences):
        assert isinstance(sentences, list)
        self.calls.append(len(sentences))
        return np.array([[len(text), text.count("a"), text.count("e")] for text in sentences], dtype=np.float32)


@given(
    seed=st.integers(0, 9999),
    n=st.integers(1, 40),
    d=st.integers(1, 9),
    q=st.integers(1, 6),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)
@settings(deadline=None)
def test_neighbours_are_those_of_brute_force(seed, n, d, q, metric, dtype, scale):
    rows, queries = normal(n, d, seed=seed) * scale, normal(q, d, seed=seed + 1)
    rows, queries = rows.astype(dtype), queries.astype(dtype)
    member = KNNFilter(rows, metric=metric)
    k = 1 + seed % n
    found = member.candidates(queries, k).numpy()
    for row, query in zip(found, queries, strict=True):
        truth = brute_force(rows, query, metric)
        np.testing.assert_allclose(member.similarities(query), truth, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(truth[row], np.sort(truth)[::-1][:k], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [7, 64, 1001])
def test_the_fast_search_is_the_exact_one(metric, n):
    """Clustered rows, whose order float32 cannot tell, with copies in other places of the matrix product."""
    rows = 1.0 + 1e-6 * normal(n, 37)
    rows[n // 2 :] = rows[: n - n // 2]
    queries = 1.0 + 1e-6 * normal(9, 37, seed=1)
    member = KNNFilter(rows, metric=metric)
    exact = torch.from_numpy(Filter._best(member, queries, 5))  # by `similarities`
    assert torch.equal(member.candidates(queries, 5), exact)
    assert torch.equal(torch.cat([member.candidates([query], 5) for query in queries]), exact)
    rough = np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :5]
    assert metric != "dot" or not np.array_equal(rough, exact)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_a_permuted_pool_ranks_the_same(metric, seed):
    rows, queries = normal(300, 48), normal(20, 48, seed=1)
    order = np.random.default_rng(seed).permutation(300)
    found = KNNFilter(rows, metric=metric).candidates(queries, 7)
    assert np.array_equal(order[KNNFilter(rows[order], metric=metric).candidates(queries, 7)], found)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e20, 1e36])
def test_embeddings_of_any_size(metric, size):
    rows, queries = normal(30, 8) * np.float32(size), normal(4, 8, seed=1)
    if metric == "euclidean":
        queries = queries * np.float32(size)
    member = KNNFilter(rows, metric=metric)
    assert np.array_equal(member.candidates(queries, 5), Filter._best(member, queries, 5))


def test_queries_whose_length_does_not_matter():
    rows, queries = normal(30, 8), normal(4, 8, seed=1, dtype=np.float64)
    for metric in ("cosine", "dot"):
        member = KNNFilter(rows, metric=metric)
        assert torch.equal(member.candidates(queries * 2.0**-90, 5), member.candidates(queries * 2.0**90, 5))


def test_the_metrics_differ():
    rows = [[1.0, 0.1], [9.0, 9.0], [1.5, 0.5]]
    best = [KNNFilter(rows, metric=metric).candidates([[1.6, 0.2]], 1).item() for metric in METRICS]
    assert best == [0, 1, 2]


def test_a_zero_row_is_like_nothing():
    member = KNNFilter([[0.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    assert member.similarities([2.0, 0.0]).tolist() == [0.0, -1.0, pytest.approx(0.5**0.5)]
    assert member.candidates([[2.0, 0.0]], 3).tolist() == [[2, 0, 1]]
    assert KNNFilter([[0.0, 0.0], [0.0, 0.0]]).candidates([[2.0, 0.0]], 2).tolist() == [[0, 1]]


def test_a_zero_query_has_neighbours_by_distance_only():
    rows = [[3.0, 0.0], [-1.0, 0.0]]
    assert KNNFilter(rows, metric="euclidean").candidates([[0.0, 0.0]], 2).tolist() == [[1, 0]]
    for metric in ("cosine", "dot"):
        with pytest.raises(ValueError, match="expected embeddings other than zero, got zero for query 1"):
            KNNFilter(rows, metric=metric).candidates([[0.0, 1.0], [0.0, 0.0]], 1)


def test_a_model_with_encode():
    model = Encoder()
    member = KNNFilter(["abe", "a tree", "eee", "banana", "zzz"], model, batch_size=2)
    assert model.calls == [2, 2, 1]
    assert member.candidates(["bananas", "tee", "a bee"], 2).tolist() == [[3, 0], [2, 1], [1, 0]]
    assert model.calls == [2, 2, 1, 2, 1]


def test_rows_need_not_be_text():
    images = [torch.full((3, 2, 2), float(k)) for k in range(4)]
    member = KNNFilter(images, lambda batch: torch.stack(batch).mean(dim=(2, 3)), metric="euclidean", batch_size=3)
    assert member.candidates([images[2] + 0.1], 2).tolist() == [[2, 3]]


def test_text_of_letters_only_is_text_whatever_the_tokenizer():
    member = KNNFilter(["x", ""], lambda texts: [[1.0, len(text)] for text in texts])
    assert member.candidates(["..."], 2).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "l2"}, r"`KNNFilter\(metric='l2'\)`: expected one of \['cosine', 'dot', 'euclidean'\]"),
        ({"batch_size": 0}, r"`KNNFilter\(batch_size=0\)`: expected an int >= 1"),
        ({"batch_size": True}, r"`KNNFilter\(batch_size=True\)`"),
        ({"embed": "a-model-name"}, r"`KNNFilter\(embed=...\)`: expected a function .* got str.*as the corpus"),
    ],
)
def test_arguments_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        KNNFilter([[1.0], [2.0]], **arguments)


def test_queries_of_another_width():
    member = KNNFilter([[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"`KNNFilter.candidates\(queries\)`: expected .* the rows' width 2, got 3"):
        member.candidates([[1.0, 2.0, 3.0]], 1)
    with pytest.raises(ValueError, match=r"`KNNFilter.similarities\(query\)`: .* the rows' width 2, got 1"):
        member.similarities([1.0])
    with pytest.raises(
        ValueError, match=r"`KNNFilter.candidates\(queries\)`: expected numbers \[2, d\].*float64 \[2\]"
    ):
        member.candidates(np.array([1.0, 2.0]), 1)


def test_queries_that_are_not_finite():
    with pytest.raises(ValueError, match=r"`KNNFilter.candidates\(queries\)`: expected finite .*not so row 1\."):
        KNNFilter([[1.0, 2.0]]).candidates([[1.0, 2.0], [np.nan, 0.0]], 1)
