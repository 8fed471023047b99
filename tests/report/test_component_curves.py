"""Curves over shares: every prefix as if it were scored alone, held-out points as a loop over splits finds them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.metrics.intervals import wilson_interval
from lightning_influence.metrics.retrieval import retrieval_ranks
from lightning_influence.report import ShareCurve, held_out_curve, path_curve, prefix_ranks
from lightning_influence.selection.component_cross_validation import cross_validate_components
from lightning_influence.selection.component_greedy import greedy_components
from lightning_influence.selection.component_pairs import ComponentPairs
from tests.evaluation.retrieval_cases import NAMES, recorded, sources


def pairs(**options) -> ComponentPairs:
    return ComponentPairs.from_dots(recorded(**options), sources())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 100), order=st.permutations(NAMES), short=st.booleans(), eps=st.sampled_from([0.0, 2.0]))
def test_every_prefix_is_ranked_as_if_it_were_alone(seed, order, short, eps):
    own = pairs(seed=seed, short=short)
    found = prefix_ranks(own, order, eps)
    assert found.shape == (len(NAMES), own.num_queries)
    for steps in range(1, len(order) + 1):
        alone = retrieval_ranks(own.cosine(order[:steps], eps), own.target, own.mask)
        assert torch.equal(found[steps - 1], alone)


def test_queries_without_a_gradient_are_misses():
    own = pairs()
    squares, dots = own.query_squares.clone(), own.dots.clone()
    squares[:, 3], dots[:, 3] = 0, 0
    found = prefix_ranks(replace(own, query_squares=squares, dots=dots), NAMES)
    assert (found[:, 3] == 4).all()


def test_a_path_by_accuracy_repeats_its_scores():
    own = pairs()
    path = greedy_components(own, progress=False)
    curve = path_curve(own, path, "greedy")
    assert curve.values == pytest.approx(path.scores)
    assert curve.shares == path.shares
    assert curve.intervals == tuple(wilson_interval(value, 40) for value in curve.values)


def test_a_path_by_anything_ends_with_all_components():
    own = pairs()
    path = greedy_components(own, "similarity", progress=False)
    curve = path_curve(own, path, "similar", groups=[query // 2 for query in range(40)])
    whole = float((retrieval_ranks(own.cosine(), own.target, own.mask) == 1).double().mean())
    assert curve.values[-1] == pytest.approx(whole)
    assert curve.intervals[-1] == wilson_interval(curve.values[-1], 20)


def test_held_out_points_are_those_of_a_loop_over_splits():
    own = pairs(noise=5.0)
    choice = cross_validate_components(own, splits=3, seed=4, progress=False)
    curve = held_out_curve(own, choice, "held-out", points=12)
    assert len(curve.shares) == 12
    assert curve.shares == tuple(sorted(curve.shares))
    for share, value in zip(curve.shares, curve.values, strict=True):
        scores = []
        for split in choice.splits:
            path = greedy_components(own.queries(split.chosen_on), progress=False)
            steps = max(k for k, part in enumerate(path.shares, start=1) if part <= share)
            others = own.queries(split.held_out)
            ranks = retrieval_ranks(others.cosine(path.order[:steps]), others.target, others.mask)
            scores.append(float((ranks == 1).double().mean()))
        assert value == pytest.approx(sum(scores) / len(scores))
    assert curve.values[-1] == pytest.approx(choice.whole)
    assert all(low <= value <= high for value, (low, high) in zip(curve.values, curve.intervals, strict=True))


def test_what_does_not_fit_is_refused():
    own = pairs()
    backward = greedy_components(own, direction="backward", progress=False)
    with pytest.raises(ValueError, match=r"`path_curve\(path\)`: expected a path that adds components, got .*backward"):
        path_curve(own, backward, "")
    choice = cross_validate_components(own, direction="backward", progress=False)
    with pytest.raises(ValueError, match=r"`held_out_curve\(path\)`: expected a path that adds"):
        held_out_curve(own, choice, "")
    forward = cross_validate_components(own, progress=False)
    with pytest.raises(ValueError, match=r"`held_out_curve\(points=1\)`: expected an int >= 2"):
        held_out_curve(own, forward, "", points=1)
    with pytest.raises(ValueError, match="expected the pairs that were cross-validated"):
        held_out_curve(own.queries(range(10)), forward, "")
    with pytest.raises(ValueError, match=r"`ShareCurve\(label='a'\)`: expected as many values.*got 2 values for 1"):
        ShareCurve("a", (0.5,), (0.5, 0.6))
    with pytest.raises(ValueError, match="at least one; got 0 values"):
        ShareCurve("a", (), ())
    with pytest.raises(ValueError, match="the nearest to"):
        prefix_ranks(own, ["model.embed"])
