from __future__ import annotations

import re
from typing import Any

import pytest

import lightning_influence
from lightning_influence.selection import Newton


def test_the_screen_is_for_long_training_unless_it_is_asked_for() -> None:
    assert lightning_influence.Newton is Newton
    assert [Newton(ridge).screens for ridge in ("random", 0.3, "saturate")] == [True, True, False]
    assert Newton("held-out").screens
    assert [Newton(ridge, screen=True).screens for ridge in ("random", 0.3, "saturate")] == [True] * 3
    assert [Newton(ridge, screen=False).screens for ridge in ("random", 0.3, "saturate")] == [False] * 3
    assert Newton() == Newton("random", None, None, 0.05, 5, None)


def test_few_targets_are_shrunk_where_rows_are_screened_unless_it_is_said() -> None:
    ridges: list[Any] = ["random", 0.3, "held-out", "saturate"]
    assert [Newton(ridge).shrinks(199) for ridge in ridges] == [True, True, True, False]
    assert not any(Newton(ridge).shrinks(200) for ridge in ridges)
    assert all(Newton(ridge, shrink=True).shrinks(200) for ridge in ridges)
    assert not any(Newton(ridge, shrink=False).shrinks(2) for ridge in ridges)


@pytest.mark.parametrize(
    ("landmarks", "rows", "found"),
    [(None, 3000, 2048), (None, 20, 20), (0, 20, 0), (20, 20, 20), (0.07, 100, 7), (0.01, 20, 1), (1.0, 20, 20)],
)
def test_number_of_landmarks(landmarks: Any, rows: int, found: int) -> None:
    assert Newton(landmarks=landmarks).landmarks_of(rows) == found


def test_more_landmarks_than_rows() -> None:
    message = (
        "`select(rule=Newton(landmarks=21))`: expected at most the 20 rows of the pool. Pass 1.0 for all of them, or "
        "None for as many as come without another pass."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Newton(landmarks=21).landmarks_of(20, call="select")


RIDGE = "expected 'random', 'saturate', 'held-out'"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({"ridge": ridge}, f"{RIDGE} or a finite number > 0, such as 0.1.") for ridge in ("best", 0, True)],
        *[({"ridge": ridge}, f"{RIDGE} or a finite number > 0, such as 0.1.") for ridge in (1e400, None, -0.1)],
        *[({"landmarks": n}, "expected a number of rows as an int >= 0, a share") for n in (-1, True, 1.5, 0.0, "all")],
        *[({name: word}, "expected True, False or None.") for word in (1, "yes") for name in ("screen", "shrink")],
        *[({"saturation": share}, "expected a share in (0, 1), such as 0.05.") for share in (0, 1, "x", True)],
        *[({"folds": folds}, "expected an int >= 2.") for folds in (1, 0, True, 2.0, "all", None)],
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], message: str) -> None:
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=re.escape(f"`Newton({name}={value!r})`: {message}")):
        Newton(**settings)


def test_fewer_targets_than_folds() -> None:
    Newton("held-out", folds=3).check_targets(3)
    Newton("random", folds=3).check_targets(1)
    message = (
        "`select(rule=Newton(folds=3))`: expected an int from 2 to the number of targets, 2, of which each is held out "
        "once. Pass fewer folds or more target examples."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Newton("held-out", folds=3).check_targets(2, "select")
