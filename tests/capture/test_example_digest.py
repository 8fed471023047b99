from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_influence.capture.example_digest import example_digest

VALUES = [
    1,
    1.0,
    "1",
    b"1",
    None,
    (1, 23),
    (12, 3),
    torch.ones(2),
    torch.ones(2, dtype=torch.float64),
    torch.ones(2, 1),
    np.ones(2),
    Image.new("L", (2, 2), 3),
    Image.new("L", (2, 2), 4),
    {"x": torch.zeros(2), "y": "a"},
    {"x": torch.zeros(2), "y": "b"},
]


def test_equal_for_equal_values_alone() -> None:
    found = [example_digest(value) for value in VALUES]
    assert len(set(found)) == len(VALUES)
    assert {len(digest or b"") for digest in found} == {16}
    assert example_digest({"x": torch.zeros(2), "y": "a"}) == found[-2]
    assert example_digest(Image.new("L", (2, 2), 3)) == found[11]


@pytest.mark.parametrize("value", [object(), {"x": 1, "y": object()}, np.array([object()])])
def test_none_where_values_cannot_be_told(value: object) -> None:
    assert example_digest(value) is None
