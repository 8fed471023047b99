from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_recall, retrieval_reciprocal_rank

from lightning_influence.estimators.candidates import CandidateScores
from lightning_influence.estimators.gradient_dot import GradientDot
from lightning_influence.estimators.lexical import Lexical
from lightning_influence.estimators.scores import Scores
from lightning_influence.evaluation.fact_tracing import evaluate_fact_tracing
from lightning_influence.filters import BM25Filter
from tests.curvature.models import mlp, points


def scores_of(values: Any) -> Scores:
    values = torch.as_tensor(values, dtype=torch.float64)
    return Scores(values, tuple(f"q{k}" for k in range(len(values))), tuple(range(values.shape[1])), "dot", "sum")


@given(data=st.data(), n=st.integers(2, 8), q=st.integers(1, 4))
def test_measures_are_those_of_torchmetrics(data: st.DataObject, n: int, q: int) -> None:
    """Without ties, whose order is open there."""
    values = torch.tensor([data.draw(st.permutations(range(n))) for _ in range(q)]).double() - n / 2
    relevant = [data.draw(st.sets(st.integers(0, n - 1), min_size=1)) for _ in range(q)]
    found = evaluate_fact_tracing(scores_of(values), {f"q{k}": rows for k, rows in enumerate(relevant)}, at=[1, 3, 99])
    target = torch.tensor([[k in rows for k in range(n)] for rows in relevant])
    shifted = values + n  # torchmetrics takes what is <= 0 for not retrieved
    expected = {"mrr": [retrieval_reciprocal_rank(v, t) for v, t in zip(shifted, target, strict=True)]}
    for k in (1, 3, 99):
        for name, measure in (("recall", retrieval_recall), ("hit", retrieval_hit_rate)):
            expected[f"{name}@{k}"] = [measure(v, t, top_k=min(k, n)) for v, t in zip(shifted, target, strict=True)]
    for key, each in expected.items():
        assert found.line("scores").measures[key] == pytest.approx(float(torch.stack(each).mean()), abs=1e-6)


def test_ties_count_against_the_relevant() -> None:
    flat = scores_of([[0.0, 0.0, 0.0, 0.0]])
    found = evaluate_fact_tracing(flat, {"q0": [0, 2]}, at=[2, 3]).line("scores").measures
    assert found == {"mrr": pytest.approx(1 / 3), "recall@2": 0.0, "hit@2": 0.0, "recall@3": 0.5, "hit@3": 1.0}


@given(n=st.integers(1, 5), data=st.data())
def test_chance_is_the_mean_over_all_orders(n: int, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(1, n), min_size=1, max_size=3))
    relevant = {f"q{k}": list(range(r)) for k, r in enumerate(numbers)}
    orders = [
        evaluate_fact_tracing(scores_of([order] * len(numbers)), relevant, at=[1, 2]).line("scores").measures
        for order in permutations(range(n))
    ]
    chance = evaluate_fact_tracing(scores_of([range(n)] * len(numbers)), relevant, at=[1, 2]).line("chance")
    assert chance.intervals == {}
    for key, value in chance.measures.items():
        assert value == pytest.approx(sum(order[key] for order in orders) / len(orders))


def test_what_is_no_candidate_is_not_found() -> None:
    values = torch.tensor([[0.1, 0.9], [0.4, 0.2], [0.3, 0.3]])
    some = CandidateScores(values, ((5, 3), (0, 1), (8, 9)), ("q0", "q1", "q2"), 10, "dot", "sum")
    relevant = {"q0": [3, 7], "q1": [1], "q2": [4]}
    found = evaluate_fact_tracing(some, relevant, at=[1, 2]).line("scores").measures
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert found["recall@1"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert found["recall@2"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found["hit@2"] == pytest.approx(2 / 3)


def test_with_all_as_candidates_it_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = scores_of(torch.randn(6, 7, generator=generator))
    order = whole.values.argsort(dim=1)
    some = CandidateScores(
        whole.values.gather(1, order), tuple(map(tuple, order.tolist())), whole.query_ids, 7, "dot", "sum"
    )
    relevant = {query: [k, (k + 3) % 7] for k, query in enumerate(whole.query_ids)}
    found = evaluate_fact_tracing({"whole": whole, "some": some}, relevant)
    assert found.line("whole").measures == pytest.approx(found.line("some").measures)


def test_of_estimators_and_filters() -> None:
    data = points(6)
    texts = [{"text": f"fact number{k}"} for k in range(6)]
    named = {
        "gradient dot": GradientDot(mlp(), normalise=True).score(data, data),
        "BM25": Lexical(BM25Filter, "text").score(texts, texts),
        "components": GradientDot(mlp(), normalise=True).score(data, data, per_component=True),
    }
    report = evaluate_fact_tracing(named, {k: [k] for k in range(6)}, at=[1])
    assert (report.num_queries, report.num_train) == (6, 6)
    assert [line.name for line in report.lines] == ["chance", *named]
    for name in named:
        assert report.line(name).measures == {"mrr": 1, "recall@1": 1, "hit@1": 1}
    assert report.line("chance").measures["recall@1"] == pytest.approx(1 / 6)
    assert str(report).splitlines()[0].split() == ["estimator", "|", "mrr", "|", "recall@1", "|", "hit@1"]
    assert "1.000 (1.000 to 1.000)" in str(report).splitlines()[3]
    row = report.rows()[1]
    assert (row["name"], row["mrr"], row["mrr_low"], row["mrr_high"]) == ("gradient dot", 1, 1, 1)
    assert report.rows()[0]["mrr_low"] is None
    with pytest.raises(ValueError, match=r"line\('tf-idf'\)`: expected one of \['chance', 'gradient dot', 'BM25'"):
        report.line("tf-idf")


def test_intervals_draw_groups() -> None:
    """Of a hundred queries that are ten cases the interval is wider, and the draws depend on the seed alone."""
    generator = torch.Generator().manual_seed(0)
    hit = (torch.rand(10, generator=generator) < 0.5).repeat_interleave(10)
    scores = scores_of(torch.stack([hit.double(), 0.5 * torch.ones(100)], dim=1))
    relevant = {query: [0] for query in scores.query_ids}
    groups = {query: k // 10 for k, query in enumerate(scores.query_ids)}
    alone = evaluate_fact_tracing(scores, relevant, at=[1]).line("scores").intervals["hit@1"]
    together = evaluate_fact_tracing(scores, relevant, at=[1], groups=groups).line("scores").intervals["hit@1"]
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
    wide = scores_of(torch.randn(100, 9, generator=generator))
    first, again, other = (
        evaluate_fact_tracing(wide, relevant, seed=seed).line("scores").intervals["mrr"] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_arguments() -> None:
    scores, relevant = scores_of([[1.0, 2.0], [3.0, 4.0]]), {"q0": [0], "q1": [1]}
    for at in ([], [0], [True], [1.5]):
        with pytest.raises(ValueError, match=r"`evaluate_fact_tracing\(at=.*\)`: expected ints >= 1"):
            evaluate_fact_tracing(scores, relevant, at=at)
    with pytest.raises(ValueError, match=r"1 of 2 queries have no relevant training example \(ids \['q1'\]\)"):
        evaluate_fact_tracing(scores, {"q0": [0], "q1": []})
    with pytest.raises(ValueError, match=r"relevant examples of 1 queries \(ids \['q0'\]\) are not among the 2 that"):
        evaluate_fact_tracing(scores, {"q0": [5], "q1": [0]})
    with pytest.raises(ValueError, match=r"\['b'\] have other queries or training examples than the first"):
        evaluate_fact_tracing({"a": scores, "b": scores_of([[1.0, 2.0]])}, relevant)
    with pytest.raises(ValueError, match="'scores' has NaN for queries"):
        evaluate_fact_tracing(scores_of([[1.0, torch.nan], [3.0, 4.0]]), relevant)
    with pytest.raises(ValueError, match=r"expected Scores or CandidateScores, at least one, got \{'a': 'int'\}"):
        evaluate_fact_tracing({"a": 3}, relevant)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"expected one for every query, none for \['q1'\]"):
        evaluate_fact_tracing(scores, relevant, groups={"q0": 0})
