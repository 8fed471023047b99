from __future__ import annotations

import re

import pytest
import torch

from lightning_influence.capture.budget import ACCELERATED, at_once, check_bytes


@pytest.mark.parametrize("value", [0, 1, 2 * 1024**3])
def test_numbers_of_bytes(value: int) -> None:
    check_bytes("EKFAC.fit", "memory_budget", value)


@pytest.mark.parametrize("value", ["1GB", -1, True, 2e9, None])
def test_others_are_refused(value: object) -> None:
    message = f"`EKFAC.fit(memory_budget={value!r})`: expected a number of bytes, an int >= 0, such as 2 * 1024**3."
    with pytest.raises(ValueError, match=re.escape(message)):
        check_bytes("EKFAC.fit", "memory_budget", value)


def test_pieces_stay_in_a_processors_cache_and_fill_an_accelerator() -> None:
    assert at_once(12, torch.device("cpu")) == 12
    assert at_once(12, torch.device("meta")) == ACCELERATED
    assert at_once(2 * ACCELERATED, torch.device("meta")) == 2 * ACCELERATED
