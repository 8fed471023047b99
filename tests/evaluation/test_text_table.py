from __future__ import annotations

import math

import pytest

from lightning_influence.evaluation.text_table import aligned, number


def test_columns_are_aligned():
    lines = aligned([["a", "long head"], ["longer", "b"]]).splitlines()
    assert lines == ["a      | long head", "-------|----------", "longer | b"]


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (0.5, None, "0.500"),
        (12.0, (-math.inf, math.inf), "12.000"),
        (math.nan, None, "-"),
        (0.0, (-0.001, 0.25), "0.000 (-0.001 to 0.250)"),
    ],
)
def test_numbers(value, interval, text):
    assert number(value, interval) == text
