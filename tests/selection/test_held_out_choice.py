from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from lightning_influence.selection import HeldOutChoice
from lightning_influence.selection.held_out_choice import check_folds

EXPLAINED = torch.tensor([[0.2, 0.3], [0.1, 0.4], [0.9, -1.0]], dtype=torch.float64)


@pytest.mark.parametrize("candidates", [(0.01, 0.1, 1.0), ("raw", "unit", "other")])
def test_the_best_is_that_with_all_picks(candidates: tuple[Any, ...]) -> None:
    choice = HeldOutChoice(candidates, EXPLAINED)
    assert choice.best == candidates[1]
    assert choice.curve.tolist() == [0.1, 0.4]


@pytest.mark.parametrize("candidates", [(0.01, 0.1, 1.0), ("raw", "unit", "other")])
def test_round_trip_through_json(candidates: tuple[Any, ...]) -> None:
    again = HeldOutChoice.from_dict(json.loads(json.dumps(HeldOutChoice(candidates, EXPLAINED).to_dict())))
    assert again.candidates == candidates
    assert again.explained.dtype == torch.float64
    assert torch.equal(again.explained, EXPLAINED)


def test_parts_that_so_many_targets_have() -> None:
    for folds in (2, 5, 9):
        check_folds("f()", folds, 9)
    message = (
        "`f(folds=10)`: expected an int from 2 to the number of targets, 9, of which each is held out once. Pass fewer "
        "folds or more target examples."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_folds("f(folds=10)", 10, 9)
    for folds in (1, 0, -3, True, 2.0, "all", None):
        with pytest.raises(ValueError, match="an int from 2 to the number of targets, 9"):
            check_folds("f()", folds, 9)  # type: ignore[arg-type]
