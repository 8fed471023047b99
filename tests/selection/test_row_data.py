from __future__ import annotations

import re

import pytest
import torch

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.row_data import checked_embeddings, places, unit_rows


def test_rows_are_found_by_id() -> None:
    assert places("rule", ("b", "a"), ("a", "x", "b")) == [2, 0]
    with pytest.raises(ValueError, match=re.escape("of 1 of 2 rows there is none: id 7. Rows are matched by id")):
        places("rule", (0, 7), range(3))


def test_unit_rows_stand_in_the_order_of_the_ids() -> None:
    pool = Factors.checked(
        "here", torch.zeros(3), torch.tensor([[3.0, 4], [0, 0], [1e200, 1e200]], dtype=torch.float64)
    )
    pool = Factors(pool.values, pool.features, None, (2, 0, 1))
    rows = unit_rows("rule", pool, None, None)
    half = 0.5**0.5
    torch.testing.assert_close(rows, torch.tensor([[0, 0], [half, half], [0.6, 0.8]], dtype=torch.float64))
    own = unit_rows("rule", pool, torch.eye(5), ["x", 1, 0, 2, "y"])
    assert own.argmax(1).tolist() == [2, 1, 3]


def test_what_is_missing_is_named() -> None:
    pool = Factors.checked("here", torch.zeros(2), ids=["a", "b"])
    with pytest.raises(ValueError, match=re.escape("`rule(features=None)`: expected features [n, r], or embeddings")):
        unit_rows("rule", pool, None, None)
    with pytest.raises(ValueError, match="1 of 2 examples have NaN or infinite embeddings: id 'b'"):
        unit_rows("rule", pool, torch.tensor([[1.0], [torch.nan]]), ["a", "b"])


def test_embeddings_are_checked() -> None:
    assert checked_embeddings("rule", [[1.0, 2.0]], None).shape == (1, 2)
    for wrong in (torch.zeros(3), torch.zeros(0, 2), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match=re.escape("`rule(embeddings)`: expected real numbers [n, d], got shape")):
            checked_embeddings("rule", wrong, None)
    with pytest.raises(ValueError, match="expected one id for each of 2 embeddings, all different; got 2 ids, 1"):
        checked_embeddings("rule", torch.zeros(2, 1), ["a", "a"])
    with pytest.raises(ValueError, match="expected embeddings to go with the ids"):
        checked_embeddings("rule", None, ["a"])
