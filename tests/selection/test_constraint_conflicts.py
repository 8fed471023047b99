"""Constraints that do not fit together, and what is said about them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lightning_influence.selection import Constraints, TokenBudget, TopK

STATIC: dict[str, tuple[dict[str, Any], str]] = {
    "both": (
        {"must_include": [1, 2], "exclude": [2, 3]},
        "`Constraints(must_include, exclude)`: expected an id in one of them only. In both: id 2.",
    ),
    "twice": (
        {"must_include": [1, 2, 1]},
        "`Constraints(must_include)`: expected each id once. More than once: id 1.",
    ),
    "a word": ({"exclude": "abc"}, "`Constraints(exclude='abc')`: expected a list of ids."),
    "no sources": (
        {"min_per_source": 1},
        "`Constraints(min_per_source=...)`: expected sources, the source of each row, to go with it.",
    ),
    "no sources for a maximum": (
        {"max_per_source": 1},
        "`Constraints(max_per_source=...)`: expected sources, the source of each row, to go with it.",
    ),
    "negative": (
        {"sources": [0], "min_per_source": -1},
        "`Constraints(min_per_source=-1)`: expected an int >= 0, or such a number by source.",
    ),
    "half": (
        {"sources": [0], "max_per_source": {0: 0.5}},
        "`Constraints(max_per_source={0: 0.5})`: expected an int >= 0, or such a number by source.",
    ),
    "flag": (
        {"sources": [0], "max_per_source": True},
        "`Constraints(max_per_source=True)`: expected an int >= 0, or such a number by source.",
    ),
    "maximum below minimum": (
        {"sources": [0], "min_per_source": 2, "max_per_source": 1},
        "`Constraints(min_per_source, max_per_source)`: expected a maximum that is not below the minimum. Source 'any' "
        "has at least 2 and at most 1.",
    ),
    "maximum of a source below minimum": (
        {"sources": ["a"], "min_per_source": {"a": 2}, "max_per_source": {"a": 1, "b": 0}},
        "`Constraints(min_per_source, max_per_source)`: expected a maximum that is not below the minimum. Source 'a' "
        "has at least 2 and at most 1.",
    ),
    "maximum of one source below minimum of all": (
        {"sources": ["a"], "min_per_source": 2, "max_per_source": {"b": 1}},
        "`Constraints(min_per_source, max_per_source)`: expected a maximum that is not below the minimum. Source 'b' "
        "has at least 2 and at most 1.",
    ),
    "duplicates": (
        {"duplicates": "drop"},
        "`Constraints(duplicates='drop')`: expected one of ['allow', 'first', 'refuse'].",
    ),
    "keys that nobody looks at": (
        {"duplicate_keys": [1, 2]},
        "`Constraints(duplicate_keys=...)`: expected duplicates='first' or 'refuse' to go with the keys.",
    ),
    "costs": (
        {"costs": 3},
        "`Constraints(costs=3)`: expected one for each row, in a sequence by position, or a mapping or function by id.",
    ),
    "sources": (
        {"sources": "web"},
        "`Constraints(sources='web')`: expected one for each row, in a sequence by position, or a mapping or function "
        "by id.",
    ),
    "stop": (
        {"stop_if_negative_gain": 1},
        "`Constraints(stop_if_negative_gain=1)`: expected True or False.",
    ),
}


@pytest.mark.parametrize("case", STATIC)
def test_what_does_not_fit_together_is_refused_at_once(case: str) -> None:
    given_, message = STATIC[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Constraints(**given_)


A = "`TopK().select(constraints)`: "
CONFLICTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown id to include": (
        2,
        {"must_include": [0, 9]},
        f"{A}must_include names rows that are not in the pool: id 9.",
    ),
    "unknown id to exclude": (2, {"exclude": ["a"]}, f"{A}exclude names rows that are not in the pool: id 'a'."),
    "unknown source with a minimum": (
        2,
        {"sources": list("aabb"), "min_per_source": {"c": 1}},
        f"{A}min_per_source names sources that no row of the pool has: ['c']. Expected some of ['a', 'b'].",
    ),
    "unknown source with a maximum": (
        2,
        {"sources": list("aabb"), "max_per_source": {"A": 1}},
        f"{A}max_per_source names sources that no row of the pool has: ['A']. Expected some of ['a', 'b'].",
    ),
    "a row without a source": (
        2,
        {"sources": list("aab"), "max_per_source": 1},
        "`TopK().select`: expected data for every row of the pool; of 1 of 4 rows there is none: id 3. Rows are "
        "matched by id, by position where no ids were given.",
    ),
    "minimum above what the source has": (
        4,
        {"sources": list("aabb"), "min_per_source": 2, "exclude": [1]},
        f"{A}source 'a' must have at least 2 rows, but only 1 of its rows may be picked. Lower min_per_source, or "
        "exclude fewer.",
    ),
    "minimums above the budget": (
        3,
        {"sources": list("aabb"), "min_per_source": 2},
        f"{A}must_include and min_per_source ask for 4 rows, more than the budget of 3. Raise the budget, or ask for "
        "fewer.",
    ),
    "included rows and minimums above the budget": (
        2,
        {"sources": list("aabb"), "min_per_source": 1, "must_include": [0, 1]},
        f"{A}must_include and min_per_source ask for 3 rows, more than the budget of 2. Raise the budget, or ask for "
        "fewer.",
    ),
    "included rows above the budget": (
        2,
        {"must_include": [0, 1, 2]},
        f"{A}must_include and min_per_source ask for 3 rows, more than the budget of 2. Raise the budget, or ask for "
        "fewer.",
    ),
    "included rows above a maximum": (
        3,
        {"sources": list("aabb"), "max_per_source": {"a": 1}, "must_include": [0, 1]},
        f"{A}must_include names 2 rows of source 'a', which may have at most 1. Raise max_per_source, or "
        "include fewer.",
    ),
    "maximums below the budget": (
        3,
        {"sources": list("aabb"), "max_per_source": 1},
        f"{A}only 2 rows may be picked, fewer than the budget of 3: the others are excluded, repeat others, or are "
        "beyond max_per_source. Expected a budget of at most 2.",
    ),
    "exclusions below the budget": (
        1.0,
        {"exclude": [3]},
        f"{A}only 3 rows may be picked, fewer than the budget of 4: the others are excluded, repeat others, or are "
        "beyond max_per_source. Expected a budget of at most 3.",
    ),
    "different rows below the budget": (
        2,
        {"duplicates": "first", "duplicate_keys": [0, 0, 0, 0]},
        f"{A}only 1 rows may be picked, fewer than the budget of 2: the others are excluded, repeat others, or are "
        "beyond max_per_source. Expected a budget of at most 1.",
    ),
    "nothing left": (
        1,
        {"exclude": [0, 1, 2, 3]},
        f"{A}expected rows that may be picked; all 4 are excluded, or of sources whose maximum is 0.",
    ),
    "no source may have any": (
        1,
        {"sources": list("aabb"), "max_per_source": 0},
        f"{A}expected rows that may be picked; all 4 are excluded, or of sources whose maximum is 0.",
    ),
    "equal rows refused": (
        1,
        {"duplicates": "refuse", "duplicate_keys": [0, 1, 0, 1], "exclude": [1]},
        f"{A}1 of 4 rows repeat another: id 2. Expected none with duplicates='refuse'; exclude them, or take "
        "duplicates='first'.",
    ),
    "equal rows included": (
        2,
        {"duplicates": "first", "duplicate_keys": [0, 1, 0, 1], "must_include": [2, 0]},
        f"{A}must_include names rows that are equal (ids 2, 0), and duplicates='first'. Expected only one of them to "
        "be "
        "included.",
    ),
    "nothing to tell equal rows by": (
        1,
        {"duplicates": "refuse"},
        f"{A}expected features or duplicate_keys to tell which rows are equal; equal values alone do not make them so.",
    ),
    "costs that are none": (
        1,
        {"costs": [1.0, 0.0, torch.nan, -1.0], "exclude": [3]},
        f"{A}expected a finite cost above 0 for each row that may be picked. 2 of 4 have none: ids 1, 2. Exclude them.",
    ),
    "tokens without counts": (
        TokenBudget(3),
        {},
        "`TopK().select(budget=TokenBudget(tokens=3, of='supervised'))`: expected counts, the tokens of each row, to "
        "spend a budget in tokens on. Pass TokenBudget(..., counts=...), in a sequence by position, or a mapping or "
        "function by id.",
    ),
    "counts that are no ints": (
        TokenBudget(3, counts=[0.5, 1, 1, 1]),
        {},
        "`TopK().select(budget=TokenBudget(tokens=3, of='supervised'))`: expected counts that are ints, one for each "
        "row.",
    ),
    "a row without tokens": (
        TokenBudget(3, counts=[1, 0, 1, 0]),
        {"exclude": [3]},
        "`TopK().select(budget)`: expected a count of at least one token for each row that may be picked. 1 of 4 have "
        "none: id 1. Exclude them.",
    ),
    "tokens below the smallest row": (
        TokenBudget(3, counts=[9, 8, 7, 1]),
        {"exclude": [3]},
        "`TopK().select(budget)`: the budget of 3 tokens is smaller than the smallest row, which has 7. Expected at "
        "least 7.",
    ),
    "a share of no token": (
        TokenBudget(0.01, counts=[9, 8, 7, 1]),
        {},
        "`TopK().select(budget)`: the budget of 0 tokens is smaller than the smallest row, which has 1. Expected at "
        "least 1.",
    ),
    "included rows above the tokens": (
        TokenBudget(8, counts=[9, 8, 7, 1]),
        {"must_include": [1, 3]},
        f"{A}the rows of must_include have 9 tokens, more than the budget of 8. Raise the budget, or include fewer.",
    ),
    "minimums above the tokens": (
        TokenBudget(9, counts=[9, 8, 7, 1]),
        {"sources": list("abab"), "min_per_source": {"a": 1}, "must_include": [1]},
        f"{A}must_include and min_per_source ask for at least 15 tokens, more than the budget of 9. Raise the budget, "
        "or "
        "ask for fewer.",
    ),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_what_no_selection_can_meet_is_refused_with_the_reason(case: str) -> None:
    budget, given_, message = CONFLICTS[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TopK().select(torch.ones(4), budget=budget, constraints=Constraints(**given_))
