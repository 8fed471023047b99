from __future__ import annotations

import torch

from lightning_influence.selection.greedy_exchange import Alone


def test_one_process_talks_to_itself() -> None:
    rows = torch.randn(3, 2)
    assert Alone().offset == 0
    assert Alone().gather(rows) is rows
    assert Alone().agree(rows) is rows
