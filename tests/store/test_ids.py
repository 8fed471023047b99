from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_influence.store.ids import plain_ids


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([3, 1], (3, 1)),
        (torch.tensor([3, 1]), (3, 1)),
        (np.array([3, 1], dtype=np.int32), (3, 1)),
        (range(2), (0, 1)),
        (["b", "a"], ("b", "a")),
        (np.array(["b", "a"]), ("b", "a")),
        (["7", "07"], ("7", "07")),
        ([], ()),
    ],
)
def test_ids_become_plain_and_keep_their_type(ids, expected):
    plain = plain_ids(ids, "f(ids=...)")
    assert plain == expected
    assert {type(value) for value in plain} <= {int} or {type(value) for value in plain} == {str}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, "1"], r"`f\(ids=...\)`: expected ids of one type, got ints and strings"),
        ([1.0], r"expected ids that are ints or strings, got 1.0"),
        ([True], r"expected ids that are ints or strings, got True"),
        ([None], r"expected ids that are ints or strings, got None"),
        ([4, 5, 4], r"expected every id once, these come more than once: \[4\]"),
    ],
)
def test_other_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        plain_ids(ids, "f(ids=...)")
