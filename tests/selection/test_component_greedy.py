from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.metrics.retrieval import mean_reciprocal_rank, retrieval_accuracy
from lightning_influence.selection import component_search
from lightning_influence.selection.component_greedy import component_score, greedy_components, single_component_scores
from lightning_influence.selection.component_objective import OBJECTIVES
from lightning_influence.selection.component_pairs import ComponentPairs
from tests.selection import oracles_components as oracles
from tests.selection.component_cases import noisy_pairs, of_gradients, small_pairs

DIRECTIONS = ("forward", "backward")


def parts(pairs: ComponentPairs) -> tuple[torch.Tensor, ...]:
    return pairs.dots, pairs.query_squares, pairs.candidate_squares, pairs.target, pairs.mask


def brute_force(
    pairs: ComponentPairs, objective: str, direction: str, eps: float = 0.0
) -> tuple[list[str], list[float]]:
    order, scores = oracles.greedy(objective, *parts(pairs), direction == "forward", eps)
    return [pairs.components[row] for row in order], scores


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(deadline=None)
@given(pairs=small_pairs(), eps=st.sampled_from([0.0, 0.0, 0.5]))
def test_every_step_is_that_of_brute_force(pairs, eps, objective, direction):
    path = greedy_components(pairs, objective, direction=direction, eps=eps)
    order, scores = brute_force(pairs, objective, direction, eps)
    assert list(path.order) == order
    assert path.scores == pytest.approx(scores, abs=1e-12)
    everything = range(len(pairs.components))
    assert path.whole == pytest.approx(oracles.objective(objective, *parts(pairs), everything, eps), abs=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_brute_force_on_numbers_that_round(objective, direction, dtype):
    pairs = noisy_pairs(7, 15, dtype=dtype)
    path = greedy_components(pairs, objective, direction=direction)
    order, scores = brute_force(pairs, objective, direction)
    assert list(path.order) == order
    assert path.scores == pytest.approx(scores, abs=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_blocks_do_not_matter(monkeypatch, objective, direction):
    pairs = noisy_pairs(20, 50)
    at_once = greedy_components(pairs, objective, direction=direction)
    monkeypatch.setattr(component_search, "_BLOCK_ON_CPU", 20 * 5 * 7)
    blocks = greedy_components(pairs, objective, direction=direction)
    assert blocks.order == at_once.order
    assert blocks.scores == pytest.approx(at_once.scores, abs=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(pairs=small_pairs(), data=st.data())
def test_order_of_queries_and_candidates_does_not_matter(objective, pairs, data):
    q, k = pairs.dots.shape[1:]
    rows = data.draw(st.permutations(range(q)))
    columns = torch.tensor(data.draw(st.permutations(range(k))))
    moved = replace(
        pairs,
        dots=pairs.dots[:, :, columns],
        candidate_squares=pairs.candidate_squares[:, :, columns],
        target=columns.argsort()[pairs.target],
        valid=pairs.mask[:, columns],
    ).queries(rows)
    before, after = greedy_components(pairs, objective), greedy_components(moved, objective)
    assert after.order == before.order
    assert after.scores == pytest.approx(before.scores, abs=1e-12)


@given(pairs=small_pairs(), data=st.data())
def test_length_of_a_gradient_does_not_matter(pairs, data):
    """Cosines are blind to it: a power of two changes no bit."""
    powers = data.draw(st.lists(st.integers(-20, 20), min_size=pairs.num_queries, max_size=pairs.num_queries))
    scale = 2.0 ** torch.tensor(powers, dtype=torch.float64)
    longer = replace(pairs, dots=pairs.dots * scale[:, None], query_squares=pairs.query_squares * scale.square())
    assert greedy_components(longer) == greedy_components(pairs)


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(pairs=small_pairs())
def test_single_components_are_the_first_step(objective, pairs):
    scores = single_component_scores(pairs, objective)
    path = greedy_components(pairs, objective)
    assert path.scores[0] == pytest.approx(scores.max().item(), abs=1e-12)
    for name, score in zip(pairs.components, scores.tolist(), strict=True):
        assert component_score(pairs, [name], objective) == pytest.approx(score, abs=1e-12)


def test_scores_are_those_of_the_metrics():
    pairs = noisy_pairs(9, 80, noise=8.0)
    for objective, metric in (("accuracy", retrieval_accuracy), ("mrr", mean_reciprocal_rank)):
        path = greedy_components(pairs, objective)
        for steps in (1, 4, 9):
            cosines = pairs.cosine(path.names(steps))
            assert path.scores[steps - 1] == pytest.approx(metric(cosines, pairs.target).item(), abs=1e-6)
        assert path.whole == path.scores[-1]


def test_similarity_ends_at_one():
    path = greedy_components(noisy_pairs(), "similarity")
    assert path.scores[-1] == pytest.approx(1, abs=1e-12)
    assert path.scores[0] < 0.9
    assert set(path.best) == set(path.components)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_components_go_by_their_place(direction):
    one = noisy_pairs(1)
    twins = ComponentPairs(
        ("c", "a", "b"), (1, 1, 1), *(p.repeat(3, *[1] * (p.dim() - 1)) for p in parts(one)[:3]), one.target
    )
    assert greedy_components(twins, direction=direction).order == ("c", "a", "b")[: 3 if direction == "forward" else 2]


@pytest.mark.parametrize("seed", [1, 2, 6])
def test_components_that_differ_by_rounding_alone_are_tied(seed):
    """Three times the gradient has the same cosines, in numbers that round otherwise."""
    one, other = noisy_pairs(1, seed=seed), noisy_pairs(1, seed=100 + seed)
    joined = (torch.cat([a, 9 * a, b]) for a, b in zip(parts(one)[:3], parts(other)[:3], strict=True))
    pairs = ComponentPairs(("short", "long", "other"), (1, 1, 1), *joined, one.target)
    assert greedy_components(pairs, "similarity").order[0] == "short"


def test_a_tie_is_a_miss():
    """Parallel gradients of other lengths have the same cosine exactly: 3/√18 = 1/√2, in numbers that round."""
    queries = torch.tensor([[[1.0, 0.0]]])
    pairs = of_gradients(queries, torch.tensor([[[[1.0, 1.0], [3.0, 3.0]]]]), torch.tensor([0]))
    assert greedy_components(pairs).scores == (0.0,)
    assert greedy_components(pairs, "mrr").scores == (0.5,)


def test_nothing_cancels_when_a_huge_component_leaves():
    """What is left after the removal is as exact as if the huge component had never been there."""
    small = noisy_pairs(5, 40)
    huge = [10.0**25 * torch.ones_like(p[:1]) for p in parts(small)[:3]]
    joined = [torch.cat([h, p]) for h, p in zip(huge, parts(small)[:3], strict=True)]
    pairs = ComponentPairs(("huge", *small.components), (1, *small.sizes), *joined, small.target)
    path = greedy_components(pairs, direction="backward")
    assert path.order[0] == "huge"
    assert path.scores[0] == greedy_components(small, direction="backward").whole
    assert path.order[1:] == greedy_components(small, direction="backward").order


def test_early_stopping_is_a_prefix():
    pairs = noisy_pairs(30, 60)
    whole = greedy_components(pairs)
    stopped = greedy_components(pairs, patience=3)
    assert len(stopped) < len(whole)
    assert whole.order[: len(stopped)] == stopped.order
    assert stopped.scores == whole.scores[: len(stopped)]
    peak = stopped.scores.index(max(stopped.scores))
    assert len(stopped) == peak + 1 + 3


def test_early_stopping_backward_goes_on_while_nothing_is_lost():
    pairs = noisy_pairs(30, 60)
    whole, stopped = (greedy_components(pairs, direction="backward", patience=p) for p in (None, 2))
    assert whole.order[: len(stopped)] == stopped.order
    assert max(stopped.scores[:-2]) > max(stopped.scores[-2:])
    assert stopped.scores[: len(stopped) - 2] == tuple(sorted(stopped.scores[: len(stopped) - 2]))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_shares_are_of_all_parameters(direction):
    pairs = noisy_pairs(4)  # sizes 1 to 4
    path = greedy_components(pairs, direction=direction)
    for step in range(1, len(path) + 1):
        assert path.shares[step - 1] == pairs.share(path.names(step))


def test_inputs_stay_untouched():
    pairs = noisy_pairs()
    before = [part.clone() for part in parts(pairs)]
    greedy_components(pairs, direction="backward")
    greedy_components(pairs, "similarity")
    assert all(torch.equal(a, b) for a, b in zip(before, parts(pairs), strict=True))


def test_a_bar_only_when_long(capfd):
    greedy_components(noisy_pairs())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "f1"}, "`greedy_components(objective='f1')`: expected one of 'accuracy', 'mrr', 'similarity'."),
        ({"direction": "up"}, "`greedy_components(direction='up')`: expected 'forward' or 'backward'."),
        ({"patience": 0}, "`greedy_components(patience=0)`: expected an int >= 1 or None."),
        ({"patience": True}, "`greedy_components(patience=True)`: expected an int >= 1 or None."),
        ({"eps": -1.0}, "`greedy_components(eps=-1.0)`: expected a number >= 0"),
        ({"eps": float("nan")}, "`greedy_components(eps=nan)`: expected a number >= 0"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        greedy_components(noisy_pairs(2, 3), **arguments)


def test_an_unknown_component_and_the_nearest_ones():
    message = (
        r"ComponentPairs\(components=\['layers.1.v_proj'\]\)`: .* nearest to 'layers.1.v_proj' are \['layers.1.q_p"
    )
    with pytest.raises(ValueError, match=message):
        component_score(noisy_pairs(), ["layers.1.v_proj"])
    with pytest.raises(ValueError, match="`single_component_scores"):
        single_component_scores(noisy_pairs(), "recall")
