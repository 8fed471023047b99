from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lightning_influence.estimators.scores import Scores
from lightning_influence.evaluation.groups import random_subsets
from lightning_influence.evaluation.lds import linear_datamodeling_score, subset_estimates
from lightning_influence.evaluation.retraining import Retraining

Q, N = 4, 12
IDS = tuple("abcdefghijkl")
SCORES = Scores(torch.randn(Q, N, generator=torch.Generator().manual_seed(0)), tuple(range(Q)), IDS, "dot", "sum")
SUBSETS = random_subsets(IDS, 30)


def additive(ids, seed):
    """Losses that fall by the score of every example."""
    inside = torch.tensor([name in ids for name in IDS])
    return 3 + seed - SCORES.values[:, inside].double().sum(1)


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_an_additive_truth_scores_one():
    losses = Retraining(additive, progress=False).losses(SUBSETS, 2)
    assert losses.shape == (30, 2, Q)
    line = linear_datamodeling_score(SCORES, SUBSETS, losses).line("scores")
    assert line.measures == {"lds": pytest.approx(1)}
    assert line.intervals["lds"] == pytest.approx((1, 1))
    other = Scores(-SCORES.values, SCORES.query_ids, IDS, "dot", "sum")
    assert linear_datamodeling_score(other, SUBSETS, losses).line("scores").measures["lds"] == pytest.approx(-1)


@pytest.mark.parametrize("kind", ["spearman", "kendall"])
def test_it_is_the_mean_over_targets_of_scipys(kind):
    measure = {"spearman": stats.spearmanr, "kendall": stats.kendalltau}[kind]
    losses = noise(1, 30, Q) + torch.stack([additive(subset, 0) for subset in SUBSETS])
    other = Scores(noise(2, Q, N), SCORES.query_ids, IDS, "dot", "sum")
    report = linear_datamodeling_score({"true": SCORES, "other": other}, SUBSETS, losses, kind=kind)
    for name, scores in {"true": SCORES, "other": other}.items():
        line = report.line(name)
        expected = []
        for q in range(Q):
            sums = [-sum(float(scores.values[q, IDS.index(k)]) for k in subset) for subset in SUBSETS]
            expected.append(measure(sums, losses[:, q]).statistic)
        assert list(line.per_target.values()) == pytest.approx(expected)
        assert line.measures["lds"] == pytest.approx(sum(expected) / Q)
        assert line.intervals["lds"][0] < line.measures["lds"] < line.intervals["lds"][1]
    assert report.line("true").intervals["lds"][0] > report.line("other").intervals["lds"][1]


def test_components_are_summed():
    apart = Scores(torch.stack([SCORES.values, 0 * SCORES.values]), SCORES.query_ids, IDS, "dot", "sum", ("x", "y"))
    assert torch.equal(subset_estimates(apart, SUBSETS), subset_estimates(SCORES, SUBSETS))


@pytest.mark.parametrize(
    ("scores", "subsets", "shape", "message"),
    [
        ({}, SUBSETS, (30, Q), "expected scores of an estimator"),
        (SCORES, SUBSETS[:1], (1, Q), "at least two subsets. Got 1"),
        (SCORES, SUBSETS, (30, Q + 1), r"\[subsets, queries\] = \[30, 4\] for 'scores'.* Got \[30, 5\]"),
        (SCORES, [("a",), ("z", "b")], (2, Q), "id 'z' have no score of 'scores'"),
        (SCORES, [("a",), ("b", "c", "b")], (2, Q), r"\(subsets\)`: expected each example .* once. Repeated: id 'b'"),
    ],
)
def test_what_does_not_fit(scores, subsets, shape, message):
    with pytest.raises(ValueError, match=message):
        linear_datamodeling_score(scores, subsets, torch.zeros(shape))


def test_losses_as_lists():
    losses = torch.randn(30, 2, Q, generator=torch.Generator().manual_seed(5))
    one, other = (linear_datamodeling_score(SCORES, SUBSETS, given) for given in (losses, losses.tolist()))
    assert one.line("scores").measures == other.line("scores").measures


def test_kind_and_nan():
    with pytest.raises(ValueError, match=r"\(kind='pearson'\)`: expected 'spearman' or 'kendall'"):
        linear_datamodeling_score(SCORES, SUBSETS, torch.zeros(30, Q), kind="pearson")
    bad = Scores(torch.full((1, N), math.nan), ("q",), IDS, "dot", "sum")
    with pytest.raises(ValueError, match="'scores' has NaN"):
        linear_datamodeling_score(bad, SUBSETS, torch.zeros(30, 1))
