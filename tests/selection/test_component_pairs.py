from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from lightning_influence.estimators.component_dots import ComponentDots
from lightning_influence.selection.component_pairs import ComponentPairs
from tests.selection import oracles_components as oracles
from tests.selection.component_cases import noisy_pairs, small_pairs

NAMES = ("layers.0.q_proj", "layers.0.up_proj")


def recorded(pairs: list[tuple[int, int]], queries: int = 2, train: int = 3) -> ComponentDots:
    """δ of component c, query q, example i is 100 c + 10 q + i, which tells where a number came from."""
    train_squares = torch.stack([100.0 * c + torch.arange(1.0, train + 1) for c in range(2)])
    return ComponentDots(
        components=NAMES,
        sizes=(4, 12),
        query_ids=tuple("abc"[:queries]),
        train_ids=tuple(range(10, 10 + train)),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        dots=torch.tensor([[100.0 * c + 10 * q + i for q, i in pairs] for c in range(2)]).reshape(2, -1),
        query_squares=torch.ones(2, queries),
        train_squares=train_squares,
        formula="dot",
        reduction="sum",
    )


def test_recorded_pairs_of_different_length():
    found = ComponentPairs.from_dots(recorded([(0, 2), (0, 0), (0, 1), (1, 1), (1, 0)]), {"a": 11, "b": 10})
    assert found.dots[1].tolist() == [[102, 100, 101], [111, 110, 0]]
    assert found.candidate_squares[0].tolist() == [[3, 1, 2], [2, 1, 0]]
    assert found.valid.tolist() == [[True, True, True], [True, True, False]]
    assert found.target.tolist() == [2, 1]
    assert found.components == NAMES
    assert found.sizes == (4, 12)


def test_recorded_pairs_of_one_length_need_no_mask():
    found = ComponentPairs.from_dots(recorded([(0, 2), (0, 0), (1, 1), (1, 0)]), [10, 11])
    assert found.valid is None
    assert found.target.tolist() == [1, 0]


def test_pairs_need_not_be_grouped():
    found = ComponentPairs.from_dots(recorded([(1, 1), (0, 2), (1, 0), (0, 0)]), [10, 11])
    assert found.dots[0].tolist() == [[2, 0], [11, 10]]


def test_cosines_are_those_of_the_recording():
    dots = recorded([(0, 2), (0, 0), (1, 1), (1, 0)])
    pairs = ComponentPairs.from_dots(dots, [10, 11])
    for names in (None, NAMES[:1], NAMES[::-1]):
        assert torch.equal(pairs.cosine(names, 0.1).flatten(), dots.cosine(names, 0.1))


@given(pairs=small_pairs())
def test_cosines_are_the_formula(pairs):
    subset = range(0, len(pairs.components), 2)
    found = pairs.cosine([pairs.components[c] for c in subset], 0.25)
    for query, column in torch.cartesian_prod(*map(torch.arange, pairs.mask.shape)).tolist():
        parts = oracles.sums(pairs.dots, pairs.query_squares, pairs.candidate_squares, subset, query, column)
        expected = oracles.cosine(*parts, 0.25) if pairs.mask[query, column] else 0.0
        assert found[query, column].item() == pytest.approx(expected, abs=1e-12)


def test_some_queries():
    pairs = replace(noisy_pairs(3, 6), valid=torch.ones(6, 5, dtype=torch.bool))
    some = pairs.queries([4, 1])
    assert torch.equal(some.cosine(), pairs.cosine()[[4, 1]])
    assert some.target.tolist() == pairs.target[[4, 1]].tolist()
    assert some.mask.shape == (2, 5)


def test_share():
    assert noisy_pairs(4).share(["layers.1.q_proj", "layers.3.q_proj"]) == 0.6
    with pytest.raises(ValueError, match=r"`ComponentPairs\(components=\['layers.1.q_proj', .*expected at least one"):
        noisy_pairs(4).share(["layers.1.q_proj"] * 2)
    with pytest.raises(ValueError, match=r"`ComponentPairs\(components=\[\]\)`: expected at least one component, each"):
        noisy_pairs(4).share([])


GOOD = [(0, 2), (0, 0), (1, 1), (1, 0)]


@pytest.mark.parametrize(
    ("pairs", "sources", "message"),
    [
        ([(0, 2), (0, 0)], [10, 11], "expected candidates for every query; 1 of 2 have none, such as ['b']."),
        ([], [10, 11], "2 of 2 have none, such as ['a', 'b']."),
        ([*GOOD, (0, 2)], [10, 11], "1 come more than once, such as (query, candidate) [('a', 12)]."),
        (
            GOOD,
            [11, 11],
            "among the candidates of its query; 1 of 2 are not, such as (query, source) [('a', 11)]. Pass",
        ),
        (GOOD, [11, 11], "`must_include`"),
        (GOOD, [10, 99], "1 of 2 are not in the pool, such as (query, source) [('b', 99)]."),
        (GOOD, ["10", 11], "1 of 2 are not in the pool, such as (query, source) [('a', '10')]."),
        (GOOD, [10], "expected one id for each of 2 queries, got 1."),
        (GOOD, "ab", "expected a mapping or a sequence of ids, got str."),
        (GOOD, 3, "expected a mapping or a sequence of ids, got int."),
        (GOOD, {"a": 10}, "expected the id of the true source of every query; 1 of 2 have none, such as ['b']."),
    ],
)
def test_recordings_that_are_refused(pairs, sources, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ComponentPairs.from_dots(recorded(pairs), sources)


NAN, BELOW = torch.full((2, 3), torch.nan), -torch.ones(2, 3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (1,)}, "`ComponentPairs(dots=[2, 3, 5])`: expected dots [c, q, k]"),
        ({"dots": torch.zeros(2, 3)}, "`ComponentPairs(dots=[2, 3])`: expected dots [c, q, k]"),
        ({"components": ("a",)}, "1 components"),
        ({"valid": torch.ones(3, 4, dtype=torch.bool)}, "'valid': (3, 5)"),
        ({"valid": torch.ones(3, 5)}, "`ComponentPairs(target, valid)`: expected int64 and bool."),
        ({"target": torch.zeros(3)}, "expected int64 and bool."),
        ({"target": torch.tensor([0, 5, -1])}, "expected a candidate's column; it is none for queries [1, 2]."),
        ({"valid": torch.zeros(3, 5, dtype=torch.bool)}, "it is none for queries [0, 1, 2]."),
        ({"components": ("a", "a")}, "names that repeat: ['a']"),
        ({"sizes": (0, 0)}, "sizes: [0, 0]"),
        ({"query_squares": NAN}, "`ComponentPairs(query_squares)`: expected finite numbers >= 0; 6 are not"),
        ({"candidate_squares": BELOW}, "30 are not, the first at (component, query, ...) [('layers.0.q_proj', 0, 0),"),
        ({"dots": torch.full((2, 3, 5), torch.inf)}, "`ComponentPairs(dots)`: expected finite numbers; 30 are not"),
    ],
)
def test_numbers_that_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(noisy_pairs(2, 3), **change)


def test_what_is_in_the_padding_does_not_matter():
    pairs = noisy_pairs(2, 3)
    valid = torch.ones(3, 5, dtype=torch.bool)
    column = (int(pairs.target[1]) + 1) % 5
    valid[1, column] = False
    dots = pairs.dots.clone()
    dots[:, 1, column] = torch.nan
    assert replace(pairs, dots=dots, valid=valid).cosine()[1, column] == 0
