from __future__ import annotations

import math
import re

import pytest
import torch

from lightning_influence.metrics.intervals import wilson_interval
from lightning_influence.metrics.retrieval import retrieval_accuracy
from lightning_influence.selection.component_cross_validation import cross_validate_components, group_numbers
from lightning_influence.selection.component_greedy import component_score, component_values, greedy_components
from lightning_influence.selection.component_objective import OBJECTIVES
from tests.selection.component_cases import noisy_pairs, of_gradients

PAIRS = noisy_pairs(12, 61, noise=6.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_split_is_a_choice_on_one_half_and_a_score_on_the_other(objective):
    found = cross_validate_components(PAIRS, objective, splits=3, patience=2)
    assert len(found.splits) == 3
    for split in found.splits:
        assert sorted(split.chosen_on + split.held_out) == list(range(61))
        assert len(split.chosen_on) == 30
        chosen = greedy_components(PAIRS.queries(split.chosen_on), objective, patience=2).best
        assert split.selection == chosen
        values = component_values(PAIRS.queries(split.held_out), chosen, objective)
        assert split.score == pytest.approx(values.mean().item())
    assert len({split.chosen_on for split in found.splits}) == 3
    assert found.held_out == pytest.approx(sum(split.score for split in found.splits) / 3)
    assert found.whole == pytest.approx(sum(split.whole for split in found.splits) / 3)
    assert found.path == greedy_components(PAIRS, objective, patience=2)
    assert found.selection == found.path.best
    assert found.in_sample == found.path.best.score
    low, high = found.interval
    assert low < found.held_out < high or (objective == "similarity" and high == pytest.approx(found.held_out))


def test_held_out_accuracy_is_that_of_the_metric():
    [split] = cross_validate_components(PAIRS, splits=1).splits
    others = PAIRS.queries(split.held_out)
    assert split.score == pytest.approx(retrieval_accuracy(others.cosine(split.selection), others.target).item())
    assert split.whole == pytest.approx(retrieval_accuracy(others.cosine(), others.target).item())


def test_noise_is_found_out():
    """Gradients that know nothing: the choice looks good on its own queries and is at chance on the others."""
    generator = torch.Generator().manual_seed(0)
    pairs = noisy_pairs(40, 80)
    noise = torch.randn(pairs.dots.shape, generator=generator, dtype=torch.float64)
    blind = type(pairs)(pairs.components, pairs.sizes, noise, pairs.query_squares, torch.ones_like(noise), pairs.target)
    found = cross_validate_components(blind)
    assert found.in_sample > found.interval[1]
    assert found.interval[0] < 0.2 < found.interval[1] < 0.4


def test_the_seed_decides():
    first, again, other = (cross_validate_components(PAIRS, splits=2, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.splits != other.splits
    assert first.path == other.path


def test_groups_stay_together():
    groups = [f"source {row // 4}" for row in range(61)]
    found = cross_validate_components(PAIRS, splits=4, groups=groups)
    for split in found.splits:
        assert not {groups[row] for row in split.chosen_on} & {groups[row] for row in split.held_out}
    alone = cross_validate_components(PAIRS, splits=4)
    assert found.interval[1] - found.interval[0] > 1.5 * (alone.interval[1] - alone.interval[0])


def test_interval_of_accuracy_is_wilsons_over_the_queries_held_out():
    found = cross_validate_components(PAIRS, splits=2)
    seen = {row for split in found.splits for row in split.held_out}
    assert found.interval == wilson_interval(found.held_out, len(seen))
    assert len(seen) < 61


def test_interval_of_the_others_is_over_queries_at_half_their_number():
    [split] = (found := cross_validate_components(PAIRS, "mrr", splits=1)).splits
    values = component_values(PAIRS.queries(split.held_out), split.selection, "mrr")
    half = 1.96 * values.std().item() / math.sqrt(31)
    assert found.interval[0] == pytest.approx(values.mean().item() - half, abs=1e-4)
    assert found.interval[1] <= 1


def drawn(q, generator):
    """Queries of one population: the same eight components, each with its blur, and queries that differ in it."""
    topic = torch.randn(8, q, 6, generator=generator, dtype=torch.float64)
    candidates = topic[:, :, None] + torch.randn(8, q, 5, 6, generator=generator, dtype=torch.float64)
    blur = torch.linspace(1, 3, 8, dtype=torch.float64)[:, None, None]
    blur = blur * torch.randn(1, q, 1, generator=generator, dtype=torch.float64).mul(0.7).exp()
    queries = candidates[:, :, 0] + blur * torch.randn(8, q, 6, generator=generator, dtype=torch.float64)
    return of_gradients(queries, candidates, torch.zeros(q, dtype=torch.long))


@pytest.mark.parametrize("objective", ["accuracy", "mrr"])
def test_interval_holds_the_truth(objective):
    """In 95 of 100 studies it should hold what such a choice is worth on the whole population."""
    generator = torch.Generator().manual_seed(0)
    population = drawn(3000, generator)
    studies = [cross_validate_components(drawn(60, generator), objective) for _ in range(100)]
    worth = [component_score(population, study.splits[0].selection, objective) for study in studies]
    truth = sum(worth) / len(worth)
    assert sum(low <= truth <= high for low, high in (study.interval for study in studies)) >= 90
    assert sum(study.in_sample for study in studies) / 100 > truth + 0.02


def test_options_reach_the_choice():
    found = cross_validate_components(PAIRS, splits=1, direction="backward", eps=0.1, progress=False)
    assert found.path.direction == "backward"
    assert found.path == greedy_components(PAIRS, direction="backward", eps=0.1)


def test_frequency():
    found = cross_validate_components(PAIRS, splits=5)
    chosen = [set(split.selection) for split in found.splits]
    assert found.frequency == {name: sum(name in c for c in chosen) / 5 for name in found.frequency}
    assert set(found.frequency) == set.union(*chosen)
    assert list(found.frequency.values()) == sorted(found.frequency.values(), reverse=True)


def test_two_queries_are_enough():
    found = cross_validate_components(PAIRS.queries([0, 1]), "mrr", splits=1)
    assert len(found.splits[0].chosen_on) == 1
    assert found.interval == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": 0}, "`cross_validate_components(splits=0)`: expected an int >= 1."),
        ({"splits": True}, "`cross_validate_components(splits=True)`: expected an int >= 1."),
        ({"groups": ["a"]}, "`cross_validate_components(groups)`: expected one for each of 61 queries, got 1."),
        ({"groups": ["a"] * 61}, "expected at least two queries of different groups."),
        ({"objective": "f1"}, "`greedy_components(objective='f1')`"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cross_validate_components(PAIRS, **arguments)


def test_group_numbers():
    assert group_numbers(["b", 1, "b"], 3, "f").tolist() == [0, 1, 0]
    assert group_numbers(None, 3, "f").tolist() == [0, 1, 2]
