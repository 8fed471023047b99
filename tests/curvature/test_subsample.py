from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.curvature.subsample import Subsample, check_subsample

UNITS = ["examples", "tokens"]


@given(
    order=st.permutations(range(8)), left=st.integers(0, 3), unit=st.sampled_from(UNITS), share=st.floats(0.05, 0.95)
)
def test_what_is_drawn_depends_on_the_example_alone(order: list[int], left: int, unit: Any, share: float) -> None:
    """Not on its place in the batch, nor on padding at either end."""
    subsample, lengths = Subsample(share, unit, 3), torch.arange(8) % 4 + 1
    ids = torch.arange(8)
    mask = torch.arange(4) < lengths[:, None]
    found = subsample.positions(ids, 4, mask)
    padded = torch.cat([torch.zeros(8, left).bool(), mask, torch.zeros(8, 1).bool()], dim=1)
    moved = subsample.positions(ids[order], 5 + left, padded[order])
    assert torch.equal(moved[:, left : left + 4], found[order])
    assert not (found & ~mask).any()
    if unit == "examples":
        assert torch.equal(found, mask & found.any(1, keepdim=True))
        assert subsample.examples(range(8)) == [k for k in range(8) if found[k].any()]
        assert subsample.examples(order) == [k for k in order if found[k].any()]
    else:
        assert subsample.examples(order) == list(order)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_about_the_share_is_drawn(unit: Any, share: float) -> None:
    """Within 5 standard deviations of a binomial; another seed draws others."""
    draws = [Subsample(share, unit, seed).positions(torch.arange(4000), 2, None)[:, 0] for seed in (0, 1)]
    for drawn in draws:
        assert abs(drawn.double().mean() - share) < 5 * (share * (1 - share) / 4000) ** 0.5
    assert not torch.equal(*draws)


@pytest.mark.parametrize("share", [0, 1.5, -0.1, float("nan"), True, "all"])
def test_a_share_is_checked(share: Any) -> None:
    with pytest.raises(ValueError, match=r"`EKFAC\(covariance_share=.*expected a number in \(0, 1\]"):
        check_subsample("EKFAC", share, "examples")


def test_a_unit_is_checked() -> None:
    with pytest.raises(ValueError, match=r"`EKFAC\(covariance_of='rows'\)`: expected 'examples' or 'tokens'"):
        check_subsample("EKFAC", 0.5, "rows")
