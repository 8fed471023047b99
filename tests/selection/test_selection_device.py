"""Where a rule looks at a pool; on a GPU itself: tests/test_accelerator.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import Interactions, NewtonPool
from lightning_influence.selection import selection_device as module
from lightning_influence.selection.selection_device import LEAST, SHARE, on_its_device, selection_device
from tests.curvature.models import normal

GPU, CPU = torch.device("cuda", 1), torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "needed", "free", "expected"),
    [
        (GPU, LEAST, SHARE * LEAST, GPU),
        (GPU, LEAST, SHARE * LEAST - 1, CPU),
        (GPU, LEAST - 1, 2**40, CPU),
        (GPU, LEAST, None, CPU),
        (GPU, 2**40, 2**33, CPU),
        (CPU, LEAST, 2**40, CPU),
        (torch.device("mps"), LEAST, 2**40, CPU),
        (torch.device("xpu", 0), LEAST, 2**40, CPU),
    ],
)
def test_a_gpu_with_room_and_double_precision_or_else_the_processor(
    device: torch.device, needed: int, free: int | None, expected: torch.device
) -> None:
    assert selection_device(device, needed, free) == expected


@dataclass
class Known:
    features: Tensor
    moved: torch.device | None = None

    def to(self, device: torch.device) -> Known:
        return Known(self.features, device)


def model_on(device: torch.device) -> Any:
    return SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=device)]))


def test_what_does_not_go_elsewhere_is_left_alone() -> None:
    known = Known(torch.zeros(4, 2))
    assert on_its_device(known, nn.Linear(2, 1)) is known


@pytest.mark.parametrize(("rows", "free", "goal"), [(100, 2**40, GPU), (100, 8 * 100 * 2 * SHARE - 1, None)])
def test_the_room_is_that_of_the_features_in_double_precision(
    rows: int, free: int, goal: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(module, "LEAST", 1)
    monkeypatch.setattr(module, "_free", lambda device: asked.append(device) or free)
    assert on_its_device(Known(torch.zeros(rows, 2, dtype=torch.float16)), model_on(GPU)).moved == goal
    assert asked == [GPU]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert on_its_device(Known(torch.zeros(rows, 2)), model_on(GPU)).moved is None


def test_memory_is_what_the_device_and_torch_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    assert module._free(GPU) == 130
    assert module._free(CPU) is module._free(torch.device("mps")) is None


def test_interactions_and_pools_can_be_placed() -> None:
    rows = normal(9, 3)
    known = Interactions.from_features(rows, rows[:4])
    for metric in (known.metric, None):
        given = replace(known, metric=metric)
        again = given.to("cpu")
        assert again.ids == given.ids
        torch.testing.assert_close(again.pairwise(range(9)), given.pairwise(range(9)))
    pool = NewtonPool(rows, rows[:4], rows[4:8], unseen=rows[:, 0].square(), shares=torch.ones(4))
    moved = pool.to("meta")
    assert {part.device.type for part in (moved.features, moved.targets, moved.curvature_targets)} == {"meta"}
    assert pool.to("cpu").select(3).ids == pool.select(3).ids
    assert NewtonPool(rows, rows[:4]).to("meta").curvature_targets is None
