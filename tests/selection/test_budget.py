from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.selection import check_budget, resolve_budget


@pytest.mark.parametrize(
    ("budget", "pool_size", "rows"),
    [
        (1, 1, 1),
        (7, 10, 7),
        (10, 10, 10),
        (1.0, 10, 10),
        (0.05, 1000, 50),
        (0.29, 100, 29),  # 0.29 * 100 is a little below 29 in floating point
        (0.25, 10, 3),  # half a row is a row
        (0.05, 10, 1),
        (np.int64(3), 10, 3),
        (np.uint8(3), 10, 3),
        (np.float32(0.1), 10, 1),
        (np.float64(0.5), 10, 5),
    ],
)
def test_counts_and_shares(budget: object, pool_size: int, rows: int) -> None:
    resolved = resolve_budget(budget, pool_size)
    assert resolved == rows
    assert type(resolved) is int


@given(share=st.floats(0, 1, exclude_min=True), pool_size=st.integers(1, 10**6))
def test_a_share_is_rounded_to_the_nearest_row(share: float, pool_size: int) -> None:
    exact = share * pool_size
    if exact < 0.5:
        with pytest.raises(ValueError, match="this share is 0 rows; pass 1 to take one"):
            resolve_budget(share, pool_size)
    else:
        rows = resolve_budget(share, pool_size)
        assert 1 <= rows <= pool_size
        assert abs(rows - exact) <= 0.5 + 1e-9


EXPECTED = "expected an int >= 1 or a fraction in (0, 1]. "


@pytest.mark.parametrize(
    ("budget", "hint"),
    [
        (0, "A selection needs at least one row."),
        (-3, "A selection needs at least one row."),
        (0.0, "As a float it is a share of the pool."),
        (-0.5, "As a float it is a share of the pool."),
        (1.5, "As a float it is a share of the pool."),
        (5.0, "Write 5 for 5 rows."),
        (float("nan"), "As a float it is a share of the pool."),
        (float("inf"), "As a float it is a share of the pool."),
        (True, "True and False are no numbers of rows."),
        (False, "True and False are no numbers of rows."),
        (np.True_, "A bool is neither."),
        ("10", "A str is neither."),
        ("10%", "A str is neither."),
        (None, "A NoneType is neither."),
        (torch.tensor(3), "A Tensor is neither."),
        ([3], "A list is neither."),
    ],
)
def test_refusals_name_the_call_and_the_way_out(budget: object, hint: str) -> None:
    message = re.escape(f"`DataSelector(budget={budget!r})`: {EXPECTED}{hint}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_budget(budget, "DataSelector")
    with pytest.raises(ValueError, match=f"^{message}$"):
        resolve_budget(budget, 100, "DataSelector")


def test_more_than_the_pool() -> None:
    message = f"`TopK().select(budget=11)`: {EXPECTED}The pool has 10 rows; pass 1.0 to take all of them."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resolve_budget(11, 10, "TopK().select")


def test_a_share_of_no_rows() -> None:
    message = f"`resolve_budget(budget=0.01)`: {EXPECTED}Of a pool of 10 rows this share is 0 rows; pass 1 to take one."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resolve_budget(0.01, 10)


def test_a_checked_budget_is_plain() -> None:
    assert type(check_budget(np.int32(4))) is int
    assert type(check_budget(np.float32(0.5))) is float
