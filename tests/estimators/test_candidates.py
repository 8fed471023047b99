from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence.capture import ExampleLoader
from lightning_influence.curvature import EKFAC
from lightning_influence.estimators.candidates import CandidateScores, TwoStage
from lightning_influence.estimators.cka import CKA
from lightning_influence.estimators.gradient_dot import GradientDot
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.estimators.lexical import Lexical
from lightning_influence.estimators.multi_stage import MultiStageInfluence
from lightning_influence.estimators.projected_dot import ProjectedDot
from lightning_influence.estimators.representation import RepresentationSimilarity
from lightning_influence.estimators.trak import TRAK
from lightning_influence.evaluation.retrieval import candidate_recall
from lightning_influence.filters import BM25Filter, KNNFilter
from lightning_influence.projections import FactoredProjection
from tests.curvature.models import Tokens, mlp, points, ready, texts

TRAIN, QUERIES = texts(9), texts(4, seed=3)


def words(row: dict[str, Tensor]) -> str:
    tokens = row["input_ids"].tolist()
    return " ".join(f"w{a}_{b}" for a, b in pairwise(tokens))


def influence(**options: Any) -> InfluenceFunction:
    return InfluenceFunction(ready(Tokens()), EKFAC(fisher="empirical"), **options).fit(TRAIN)


@pytest.mark.parametrize("make", [lambda **o: GradientDot(ready(Tokens()), **o), influence])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_candidates_are_scored_as_all_are(make: Any, normalise: bool, k: int) -> None:
    estimator = make(normalise=normalise)
    found = TwoStage(BM25Filter, estimator, k, words).score(QUERIES, TRAIN)
    whole = estimator.score(QUERIES, TRAIN)
    expected = BM25Filter([words(row) for row in TRAIN]).candidates([words(row) for row in QUERIES], k)
    assert [list(row) for row in found.candidates] == expected.tolist()
    torch.testing.assert_close(found.values.double(), whole.values.gather(1, expected))
    assert found.formula == f"{whole.formula}, {k} candidates by BM25Filter"
    assert (found.reduction, found.damping) == (whole.reduction, whole.damping)
    assert (found.query_ids, found.num_train) == ((0, 1, 2, 3), 9)
    assert found.top(1, query=2)[0] == max(
        zip(found.candidates[2], found.values[2].tolist(), strict=True), key=lambda t: t[1]
    )


def test_gradients_of_candidates_only() -> None:
    """Every example that is nobody's candidate would raise."""
    near = [[0.0, 1.0]] * 3 + [[1.0, 0.0]] * 6
    train = [row if k < 3 else (row[0] * torch.nan, row[1]) for k, row in enumerate(points(9))]
    pool = KNNFilter(near)
    for estimator in (GradientDot(mlp()), InfluenceFunction(mlp()).fit(points(9))):
        found = TwoStage(pool, estimator, 3, lambda row: [0.0, 1.0]).score(points(2, seed=4), train)
        assert found.candidates == ((0, 1, 2),) * 2
        assert found.values.isfinite().all()


def test_other_estimators_have_the_same_call() -> None:
    lexical = Lexical(BM25Filter([words(row) for row in TRAIN]), words)
    found = TwoStage(BM25Filter, lexical, 4, words).score(QUERIES, TRAIN)
    assert (found.values.diff(dim=1) <= 0).all()
    assert found.top(2) == list(zip(found.candidates[0][:2], found.values[0, :2].tolist(), strict=True))
    assert found.top(1, harmful=True)[0][1] == found.values[0, -1]


@pytest.mark.parametrize(
    "make",
    [
        CKA,
        lambda model: RepresentationSimilarity(model, "up"),
        lambda model: TRAK(model, FactoredProjection(1.0), damping_share=0.1).fit(TRAIN),
        lambda model: MultiStageInfluence(model, model, EKFAC(), EKFAC()).fit(TRAIN, TRAIN),
        lambda model: ProjectedDot(model, FactoredProjection(1.0)),
    ],
)
def test_every_estimator_can_be_the_second_stage(make: Any) -> None:
    estimator = make(ready(Tokens()))
    found, whole = TwoStage(BM25Filter, estimator, 3, words).score(QUERIES, TRAIN), estimator.score(QUERIES, TRAIN)
    torch.testing.assert_close(found.values, whole.values.gather(1, torch.tensor(found.candidates)))


def test_ids_are_positions_in_the_dataset() -> None:
    some = ExampleLoader(TRAIN, indices=[7, 2, 5, 1])
    stages = TwoStage(BM25Filter, GradientDot(ready(Tokens())), 2, words)
    found = stages.score(QUERIES, some)
    assert {k for row in found.candidates for k in row} <= {7, 2, 5, 1}
    whole = GradientDot(ready(Tokens())).score(QUERIES, TRAIN).values
    torch.testing.assert_close(found.values.double(), whole.gather(1, torch.tensor(found.candidates)))
    permuted = TwoStage(BM25Filter([words(row) for row in TRAIN]), influence(), 9, words)
    order = [3, 0, 8, 1, 2, 7, 4, 6, 5]
    scores = permuted.score(QUERIES, ExampleLoader(TRAIN, indices=order))
    torch.testing.assert_close(scores.values, permuted.score(QUERIES, TRAIN).values)
    with pytest.raises(ValueError, match=r"its pool has 9 rows, of which 4 are to be searched. Hand over the class"):
        TwoStage(BM25Filter([words(row) for row in TRAIN]), influence(), 2, words).score(QUERIES, some)


def test_recall_of_the_filter() -> None:
    stages = TwoStage(BM25Filter, GradientDot(ready(Tokens())), 1, words)
    found = stages.score(TRAIN, TRAIN)
    assert candidate_recall(found.candidates, range(9)) == candidate_recall(stages.candidates(TRAIN, TRAIN), range(9))
    assert candidate_recall(stages.candidates(TRAIN, TRAIN), range(9)) == 1


def test_arguments() -> None:
    dot = GradientDot(mlp())
    for k in (0, True, 2.0):
        with pytest.raises(ValueError, match=r"`TwoStage\(k=.*\)`: expected an int >= 1"):
            TwoStage(BM25Filter, dot, k, words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`TwoStage\(estimator=int\)`: expected an estimator with score"):
        TwoStage(BM25Filter, 3, 2, words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`TwoStage\(filter=str\)`"):
        TwoStage("bm25", dot, 2, words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected an int from 1 to the 9 rows of the pool"):
        TwoStage(BM25Filter, dot, 10, words).score(QUERIES, TRAIN)


def test_labels_must_fit() -> None:
    rows = ((4, 2), (1, 0))
    scores = CandidateScores(torch.zeros(2, 2), rows, ("a", "b"), 9, "dot", "sum")
    assert repr(scores) == "CandidateScores(2 queries x 2 of 9 training examples, formula='dot')"
    for values, candidates in (
        (torch.zeros(2, 3), rows),
        (torch.zeros(2, 2), rows[:1]),
        (torch.zeros(2, 2), ((1, 2), (3,))),
    ):
        with pytest.raises(ValueError, match=r"expected \[q, k\] = \(2, \d\) from the query ids"):
            CandidateScores(values, candidates, ("a", "b"), 9, "dot", "sum")
