from __future__ import annotations

import re

import pytest
import torch

from lightning_influence.selection import Random


def test_the_seed_decides() -> None:
    values = torch.zeros(50)
    first = Random(seed=1).select(values, budget=20).ids
    assert first == Random(seed=1).select(values, budget=20).ids
    assert first != Random(seed=2).select(values, budget=20).ids
    assert first != tuple(range(20))


def test_values_do_not_matter() -> None:
    values = torch.arange(50.0)
    assert Random().select(values, budget=20).ids == Random().select(-values, budget=20).ids


def test_every_row_is_as_likely() -> None:
    counts = torch.zeros(10)
    for seed in range(1000):
        counts[list(Random(seed).select(torch.zeros(10), budget=3).positions)] += 1
    assert (counts - 300).abs().max() < 5 * (1000 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "0", None, True])
def test_bad_seeds(seed: object) -> None:
    message = f"`Random(seed={seed!r})`: expected an int with 0 <= seed < 2**63."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Random(seed=seed)
