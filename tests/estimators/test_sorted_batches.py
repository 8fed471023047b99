from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.capture import ExampleLoader
from lightning_influence.estimators.sorted_batches import SortedLoader


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30),
    positions=st.integers(1, 60),
    most=st.integers(1, 6),
    done=st.integers(0, 4),
)
def test_every_example_once_within_the_limits_longest_first(
    lengths: list[int], positions: int, most: int, done: int
) -> None:
    loader = SortedLoader(ExampleLoader(list(range(len(lengths))), most), lengths, positions)
    batches = [ids.tolist() for ids, _ in loader]
    assert len(loader) == len(batches)
    order = [k for batch in batches for k in batch]
    assert order == sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    for batch in batches:
        assert len(batch) <= most
        assert len(batch) == 1 or max(lengths[k] for k in batch) * len(batch) <= positions
    assert [ids.tolist() for ids, _ in loader.after(done)] == batches[done:]


def test_examples_come_collated_as_the_loader_does() -> None:
    loader = ExampleLoader(["abcd", "e", "f"], 2, "".join)
    assert [batch for _, batch in SortedLoader(loader, [1, 3, 2], 3)] == ["e", "f", "abcd"]


def test_bad_input_is_refused() -> None:
    loader = ExampleLoader([1, 2])
    with pytest.raises(ValueError, match=r"got 1 for 2 examples"):
        SortedLoader(loader, [1], 4)
    with pytest.raises(ValueError, match=r"positions=0\)`: expected an int >= 1"):
        SortedLoader(loader, [1, 1], 0)
