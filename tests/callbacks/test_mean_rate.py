from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_influence.callbacks.mean_rate import MeanRate


def test_of_the_parameters_that_count() -> None:
    wide, narrow, other = nn.Linear(3, 2, bias=False), nn.Linear(1, 2, bias=False), nn.Linear(2, 2)
    groups = [{"params": wide.parameters()}, {"params": narrow.parameters(), "lr": 0.5}]
    optimizer = torch.optim.Adam([*groups, {"params": other.parameters(), "lr": 9.0}], lr=0.1)
    rate = MeanRate()
    rate.note(optimizer)
    assert rate.mean is None
    rate.watch([*wide.parameters(), *narrow.parameters()])
    rate.note(optimizer)
    assert rate.mean == pytest.approx((0.1 * 6 + 0.5 * 2) / 8)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.3)
    rate.note(optimizer)
    assert rate.mean == pytest.approx((0.2 + (0.3 * 6 + 0.5 * 2) / 8) / 2)
    rate.note(torch.optim.SGD(other.parameters(), lr=5.0))
    assert rate.count == 2
    again = MeanRate()
    again.load(rate.state())
    assert again.mean == rate.mean
    rate.clear()
    assert rate.mean is None


def test_one_rate_is_kept_to_the_last_bit() -> None:
    layer, rate = nn.Linear(3, 7), MeanRate()
    rate.watch(layer.parameters())
    rate.note(torch.optim.Adam(layer.parameters(), lr=0.1))
    assert rate.mean == 0.1
