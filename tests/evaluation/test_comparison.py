from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lightning_influence.estimators.scores import Scores
from lightning_influence.evaluation.comparison import compare
from lightning_influence.selection.top_k import TopK


def scores(seed, ids=tuple(range(6))):
    return Scores(torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)), (0, 1, 2), ids, "dot", "sum")


def test_overlap_composition_and_cost():
    found = compare(
        {"a": [0, 1, 2], "b": torch.tensor([2, 3]), "c": [4]},
        sources=["x", "x", "y", "y", "z"],
        classes=torch.tensor([0, 1, 1, 1, 0]),
        costs={k: 10 * k for k in range(5)},
        seconds={"b": 2.5},
    )
    assert found.overlap.tolist() == [[1, 1 / 4, 0], [1 / 4, 1, 0], [0, 0, 1]]
    a, b, c = found.lines
    assert (a.sources, a.classes) == ({"x": 2 / 3, "y": 1 / 3}, {1: 2 / 3, 0: 1 / 3})
    assert a.class_entropy == pytest.approx(stats.entropy([1 / 3, 2 / 3]))
    assert (b.class_entropy, c.class_entropy) == (0, 0)
    assert [line.cost for line in found.lines] == [30, 50, 40]
    assert [line.seconds for line in found.lines] == [None, 2.5, None]
    assert [line.size for line in found.lines] == [3, 2, 1]
    assert found.rows()[0]["source: x"] == 2 / 3
    assert "x 67 %, y 33 %" in str(found)
    assert "overlap (Jaccard)" in str(found)


def test_losses_have_students_interval():
    found = compare({"a": [0], "b": [1]}, losses={"a": [0.5, 0.6, 0.9]})
    line = found.line("a")
    mean, error = 2 / 3, stats.sem([0.5, 0.6, 0.9])
    assert line.loss == pytest.approx(mean)
    assert line.loss_interval == pytest.approx(stats.t.interval(0.95, 2, mean, error))
    assert (found.line("b").loss, found.line("b").losses) == (None, ())
    assert found.rows()[0]["loss_high"] == line.loss_interval[1]
    assert "class entropy" not in str(found)


def test_score_tables_agree_by_the_mean_over_queries():
    tables = {"one": scores(0), "other": scores(1), "values": torch.arange(6)}
    found = compare({}, tables)
    means = [scores(0).values.mean(0), scores(1).values.mean(0), torch.arange(6)]
    for i, left in enumerate(means):
        for j, right in enumerate(means):
            assert found.rank_correlation[i, j].item() == pytest.approx(stats.spearmanr(left, right).statistic)
    assert found.scored == ("one", "other", "values")
    assert str(found).startswith("rank correlation (Spearman)")


def test_selections_of_rules():
    values = torch.tensor([0.1, 0.9, 0.5, 0.7])
    found = compare({"top": TopK().select(values, budget=2), "ids": ["a"]})
    assert found.line("top").size == 2
    assert found.overlap.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("selections", "options", "message"),
    [
        ({}, {}, "expected selections or scores"),
        ({"a": []}, {}, "'a' is empty"),
        ({"a": [1, 1]}, {}, "'a'"),
        ({"a": [0, 7]}, {"sources": ["x"]}, r"\(sources\)`: expected one for every row that was chosen, none for id 7"),
        ({"a": [0]}, {"costs": {1: 2.0}}, r"\(costs\)`: .* none for id 0"),
        ({"a": [0]}, {"losses": {"b": [1.0]}}, r"\(losses\)`: \['b'\] are no selections"),
        ({"a": [0]}, {"losses": {"a": 0.5}}, r"\(losses\)`: 'a' has 0.5; expected a list of losses, one for each seed"),
        ({"a": [0]}, {"losses": {"a": [1.0, math.nan]}}, r"\(losses\)`: 'a' has \[1.0, nan\]; expected finite"),
        ({"a": [0]}, {"seconds": {"b": 1.0}}, r"\(seconds\)`: \['b'\] are no selections"),
        ({"a": [0]}, {"scores": {"x": scores(0), "y": torch.ones(5)}}, r"of one pool, in one order. Got .*\[5\]"),
        ({"a": [0]}, {"scores": {"x": scores(0), "y": scores(0, tuple("abcdef"))}}, "of one pool"),
    ],
)
def test_what_cannot_be_compared(selections, options, message):
    with pytest.raises(ValueError, match=message):
        compare(selections, **options)


def test_unknown_line_and_single_seed():
    found = compare({"a": [0]}, losses={"a": [1.0]})
    assert found.line("a").loss_interval == (-math.inf, math.inf)
    with pytest.raises(ValueError, match=r"line\('b'\)`: expected one of \['a'\]"):
        found.line("b")
