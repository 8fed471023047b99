from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from lightning_influence.capture import ExampleLoader
from lightning_influence.selection.pool_audit import PoolAudit, audit_pool
from tests.curvature.models import Tokens, mlp, points, ready, texts


def audit(model: nn.Module, pool: Any, targets: Any, **options: Any) -> PoolAudit:
    return audit_pool(model, ExampleLoader(pool, 4), ExampleLoader(targets, 4), progress=False, **options)


def without_labels(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**row, "labels": torch.full_like(row["labels"], -100)}


def test_nothing_to_say() -> None:
    found = audit(mlp(), points(9), points(4, seed=5))
    assert found == PoolAudit(9, (), (), ())
    assert found.remarks == []


def test_everything_is_found() -> None:
    pool, targets = texts(9), texts(3, seed=5)
    pool[2] = without_labels(pool[2])
    pool[7] = without_labels(pool[7])
    pool[5] = {key: value.clone() for key, value in pool[1].items()}
    pool[8] = targets[0]
    found = audit(ready(Tokens()), pool, targets)
    assert found == PoolAudit(9, (2, 7), (5,), (8,))
    assert found.remarks == [
        "2 of 9 pool rows have no supervised target and are left out (ids [2, 7]).",
        "1 of 9 pool rows repeat an earlier row; interactions discount them, additive rules do not (ids [5]).",
        "1 of 9 pool rows also stand in the target set, so the selection may only memorise the target (ids [8]).",
    ]


@pytest.mark.parametrize(
    ("leaf", "suspect"),
    [
        (torch.tensor([1.0, torch.nan]), True),
        (torch.tensor([1, 2]), False),
        (np.array([np.inf]), True),
        (np.array(["nan"]), False),
        (np.array([2]), False),
        (float("nan"), True),
        (1.0, False),
        (3, False),
        ("nan", False),
        (None, False),
    ],
)
def test_numbers_that_are_none_make_a_row_suspect(leaf: Any, suspect: bool) -> None:
    pool = ExampleLoader([(*row, leaf) for row in points(3)], 4, collate_fn=pairs)
    found = audit_pool(mlp(), pool, ExampleLoader(points(2, seed=5)), progress=False)
    assert found.suspects == ((0, 1, 2) if suspect else ())
    assert not any("suspect" in remark for remark in found.remarks)


def pairs(rows: list[Any]) -> Any:
    """The inputs and labels of the rows, without what else they hold."""
    return default_collate([row[:2] for row in rows])


def test_many_ids_are_cut() -> None:
    assert PoolAudit(50, tuple(range(20)), (), ()).remarks[0].endswith("(ids [0, 1, 2, 3, 4, 5, 6, 7]).")


def test_only_the_rows_that_are_visited_count() -> None:
    pool = points(4) * 2
    visited = ExampleLoader(pool, 3, indices=[6, 1, 2])
    assert audit_pool(mlp(), visited, ExampleLoader(points(1)), progress=False) == PoolAudit(3, (), (2,), ())


def test_the_model_does_not_run() -> None:
    model = mlp()
    model.forward = None
    assert audit(model, points(3), points(2, seed=5)).size == 3


LONG = np.zeros(5000)
LONG_TOO = LONG.copy()
LONG_TOO[2500] = 1.0  # in the middle, which a printed array leaves out


class Named:
    """Equal names, different things."""

    def __repr__(self) -> str:
        return "thing"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (LONG, LONG.copy(), True),
        (LONG, LONG_TOO, False),
        (np.zeros(4), np.zeros((2, 2)), False),
        (torch.zeros(4), torch.zeros(2, 2), False),
        (torch.zeros(4), torch.zeros(4).double(), False),
        (torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16), True),
        (torch.tensor([True]), torch.tensor([False]), False),
        ([1, 23], [12, 3], False),
        (("a", "bc"), ("ab", "c"), False),
        ([1, 2], [1, 2], True),
        ({"a": 1, "b": [2.0, None]}, {"a": 1, "b": [2.0, None]}, True),
        (1, 1.0, False),
        ("1", 1, False),
        (b"x", b"x", True),
        (Named(), Named(), False),
        (np.array([Named()], dtype=object), np.array([Named()], dtype=object), False),
    ],
)
def test_which_rows_are_the_same(one: Any, other: Any, same: bool) -> None:
    x, y = torch.zeros(3).double(), torch.tensor(1)

    def collate(rows: list[Any]) -> Any:
        return torch.stack([x for _ in rows]), torch.stack([y for _ in rows])

    pool = ExampleLoader([(one, 1), (other, 1)], 2, collate)
    targets = ExampleLoader([(other, 1), ("elsewhere", 1)], 2, collate)
    found = audit_pool(mlp(), pool, targets, progress=False)
    assert found.duplicates == ((1,) if same else ())
    unclear = "thing" in repr(one)
    assert found.leaked == (() if unclear else (0, 1) if same else (1,))


class Image:
    """As an image of PIL: it prints its address, and shows its pixels to numpy."""

    def __init__(self, value: int) -> None:
        self.pixels = np.full((4, 3), value, dtype=np.uint8)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.pixels.__array_interface__


def test_images() -> None:
    def collate(rows: list[Any]) -> Any:
        return torch.zeros(len(rows), 3).double(), torch.zeros(len(rows), dtype=torch.int64)

    pool = ExampleLoader([(Image(7), 0), (Image(8), 0), (Image(7), 0)], 2, collate)
    targets = ExampleLoader([(Image(8), 1)], 2, collate)
    assert audit_pool(mlp(), pool, targets, progress=False).duplicates == (2,)
