from __future__ import annotations

import pytest
import torch

from lightning_influence.selection import RidgeChoice
from lightning_influence.selection.ridge_choice import RIDGES


@pytest.mark.parametrize(
    ("errors", "best"), [((0.5, 0.4, 0.45, 0.5), 3), ((0.4, 0.5, 0.9, 0.9), 1), ((1.3, 1.1, 1.1, 1.3), 3)]
)
def test_the_largest_ridge_that_explains_nearly_as_much(errors: tuple[float, ...], best: float) -> None:
    assert RidgeChoice((1, 2, 3, 4), torch.tensor(errors)).best == best


def test_a_larger_share_asks_for_a_smaller_ridge() -> None:
    choice = RidgeChoice((1, 2, 3, 4), torch.tensor((0.2, 0.25, 0.3, 0.9)))
    assert [choice.nearly(share) for share in (0.99, 0.93, 0.8, 0.1)] == [1, 2, 3, 4]


def test_what_is_tried_covers_three_decades() -> None:
    assert (RIDGES[0], RIDGES[-1], len(RIDGES)) == (pytest.approx(0.01), pytest.approx(10), 13)
