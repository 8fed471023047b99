from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.estimators.threads import shares, side_by_side


@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_run_with_one_thread_each_and_the_caller_keeps_its_own(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert side_by_side(lambda piece: (piece, torch.get_num_threads()), [4, 1, 2]) == [(4, 1), (1, 1), (2, 1)]
        assert torch.get_num_threads() == threads
        assert side_by_side(lambda piece: torch.get_num_threads(), [0]) == [1]
        with pytest.raises(ZeroDivisionError):
            side_by_side(lambda piece: 1 / piece, [1, 0])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@given(sizes=st.lists(st.floats(0, 100), min_size=1, max_size=20), number=st.integers(1, 5))
def test_shares_are_even_as_far_as_the_sizes_allow(sizes: list[float], number: int) -> None:
    found = shares(sizes, number)
    assert sorted(place for share in found for place in share) == list(range(len(sizes)))
    assert len(found) == min(number, len(sizes))
    sums = [sum(sizes[place] for place in share) for share in found]
    assert max(sums) - min(sums) <= max(sizes) + 1e-9
