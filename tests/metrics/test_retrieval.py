from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalRecall

from lightning_influence.metrics.retrieval import (
    RetrievalAccuracy,
    mean_reciprocal_rank,
    pessimistic_inputs,
    recall_at_k,
    retrieval_accuracy,
    retrieval_ranks,
)


@dataclass
class Lists:
    scores: Tensor
    target: Tensor
    valid: Tensor | None


@st.composite
def lists(draw: st.DrawFn) -> Lists:
    """Few different scores, so that ties are common; some candidates are padding, with any score."""
    q, k = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    row = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, float("inf")]), min_size=k, max_size=k)
    scores = torch.tensor(draw(st.lists(row, min_size=q, max_size=q)))
    target = torch.tensor(draw(st.lists(st.integers(0, k - 1), min_size=q, max_size=q)))
    if draw(st.booleans()):
        return Lists(scores, target, None)
    bools = st.lists(st.booleans(), min_size=k, max_size=k)
    valid = torch.tensor(draw(st.lists(bools, min_size=q, max_size=q))).scatter(1, target[:, None], True)
    return Lists(scores.masked_fill(~valid & (scores == 0), float("nan")), target, valid)


def oracle(case: Lists) -> list[int]:
    """Place of the source when every tie is resolved against it, by sorting."""
    ranks = []
    for row, (scores, target) in enumerate(zip(case.scores.tolist(), case.target.tolist(), strict=True)):
        kept = [j for j in range(len(scores)) if case.valid is None or bool(case.valid[row, j])]
        order = sorted(kept, key=lambda j: (-scores[j], j == target))
        ranks.append(order.index(target) + 1)
    return ranks


@given(case=lists())
def test_ranks_and_what_follows_from_them(case: Lists) -> None:
    ranks = oracle(case)
    found = retrieval_ranks(case.scores, case.target, case.valid)
    assert found.dtype == torch.int64
    assert found.tolist() == ranks
    n = len(ranks)
    arguments = (case.scores, case.target)
    assert retrieval_accuracy(*arguments, case.valid).item() == pytest.approx(sum(r == 1 for r in ranks) / n)
    assert mean_reciprocal_rank(*arguments, case.valid).item() == pytest.approx(sum(1 / r for r in ranks) / n)
    for k in (1, 2, 9):
        assert recall_at_k(*arguments, k, case.valid).item() == pytest.approx(sum(r <= k for r in ranks) / n)


@given(case=lists())
def test_torchmetrics_agrees_when_fed_without_ties(case: Lists) -> None:
    arguments = (case.scores, case.target)
    mrr, recall, hits = RetrievalMRR(), RetrievalRecall(top_k=2), RetrievalHitRate(top_k=1)
    for metric in (mrr, recall, hits):
        metric.update(*pessimistic_inputs(*arguments, case.valid))
    assert mrr.compute().item() == pytest.approx(mean_reciprocal_rank(*arguments, case.valid).item())
    assert recall.compute().item() == pytest.approx(recall_at_k(*arguments, 2, case.valid).item())
    assert hits.compute().item() == pytest.approx(retrieval_accuracy(*arguments, case.valid).item())


def test_why_torchmetrics_is_not_fed_the_scores() -> None:
    """Known limits of torchmetrics that `pessimistic_inputs` exists for: a non-positive source is not retrieved."""
    scores, target = torch.tensor([[-0.1, -0.2]]), torch.tensor([0])
    mrr = RetrievalMRR()
    mrr.update(scores.flatten(), torch.tensor([True, False]), torch.tensor([0, 0]))
    assert mrr.compute().item() == 0.0
    assert mean_reciprocal_rank(scores, target).item() == 1.0


def test_torchmetrics_over_batches_needs_numbers_of_queries() -> None:
    scores, target = torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.tensor([0, 0])
    mrr = RetrievalMRR()
    for row in range(2):
        mrr.update(*pessimistic_inputs(scores[[row]], target[[row]], queries=torch.tensor([row])))
    assert mrr.compute().item() == pytest.approx(0.75)


@given(cases=st.lists(lists(), min_size=1, max_size=4))
def test_updates_and_ranks_add_up(cases: list[Lists]) -> None:
    ranks = [RetrievalAccuracy(), RetrievalAccuracy()]
    for index, case in enumerate(cases):
        ranks[index % 2].update(case.scores, case.target, case.valid)
    merged = RetrievalAccuracy()
    merged.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    for rank in ranks:
        merged.merge_state({"hits": rank.hits, "queries": rank.queries})
    hits = [rank == 1 for case in cases for rank in oracle(case)]
    assert merged.compute().item() == pytest.approx(sum(hits) / len(hits))


def test_a_score_that_knows_nothing_is_never_right() -> None:
    assert retrieval_accuracy(torch.zeros(7, 5), torch.arange(7) % 5).item() == 0.0
    assert retrieval_ranks(torch.zeros(7, 5), torch.arange(7) % 5).tolist() == [5] * 7


def test_alone_is_at_the_top() -> None:
    assert retrieval_accuracy(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)).item() == 1.0


def test_forward_gives_the_batch_and_keeps_the_whole() -> None:
    metric = RetrievalAccuracy()
    assert metric(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).item() == 1.0
    assert metric(torch.tensor([[1.0, 0.0]]), torch.tensor([1])).item() == 0.0
    assert metric.compute().item() == 0.5
    metric.reset()
    assert metric.queries.item() == 0


SCORES, TARGET = torch.zeros(2, 3), torch.tensor([0, 2])
NAN = torch.tensor([[0.0, 0.0, 0.0], [0.0, float("nan"), 0.0]])


@pytest.mark.parametrize(
    ("scores", "target", "valid", "message"),
    [
        (SCORES[0], TARGET, None, r"`retrieval_ranks\(scores, target, valid\)`: .* got shapes \[3\], \[2\], None"),
        (SCORES, TARGET[:1], None, r"got shapes \[2, 3\], \[1\], None"),
        (SCORES, TARGET.float(), None, r"expected scores \[q, k\], whole numbers \[q\]"),
        (SCORES, TARGET, torch.ones(2, 3), r"bool \[q, k\] or None"),
        (SCORES, torch.tensor([0, 3]), None, r"expected the column of a candidate for each query; .* queries \[1\]"),
        (SCORES, torch.tensor([-1, 0]), None, r"it is none for queries \[0\]"),
        (SCORES, TARGET, torch.tensor([[True, True, True], [True, True, False]]), r"it is none for queries \[1\]"),
        (NAN, TARGET, None, r"`retrieval_ranks\(scores\)`: expected numbers, found NaN for queries \[1\]"),
        (NAN.expand(2, 2, 3)[0].repeat(20, 1), TARGET.repeat(20), None, r"1, 3, .* 15\] and 12 more"),
    ],
)
def test_what_is_refused(scores: Tensor, target: Tensor, valid: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(scores, target, valid)


def test_no_query() -> None:
    with pytest.raises(ValueError, match="retrieval of no query: expected at least one query"):
        retrieval_accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="retrieval of no query"), pytest.warns(UserWarning, match="before"):
        RetrievalAccuracy().compute()


@pytest.mark.parametrize("k", [0, True, 1.5])
def test_k(k: object) -> None:
    with pytest.raises(ValueError, match=r"`recall_at_k\(k=.*\)`: expected an int >= 1"):
        recall_at_k(SCORES, TARGET, k)


@pytest.mark.parametrize("queries", [torch.tensor([0]), torch.tensor([0.0, 1.0])])
def test_numbers_of_queries(queries: Tensor) -> None:
    with pytest.raises(ValueError, match=r"`pessimistic_inputs\(queries\)`: expected a whole number for each of 2"):
        pessimistic_inputs(SCORES, TARGET, queries=queries)
