"""The second pass from the records of the first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_influence.capture.record import DenseRecord, SumRecord
from lightning_influence.curvature import EKFAC, KFAC
from lightning_influence.curvature.kept import KeptRecords
from lightning_influence.curvature.subsample import Subsample
from tests.curvature.models import Mixed, Tokens, normal, ready, texts, token_rows
from tests.curvature.test_blocks import factored


class Counting:
    """The rows of a dataset, with every visit counted."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.visits = rows, [0] * len(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> Any:
        self.visits[k] += 1
        return self.rows[k]


@pytest.mark.parametrize(("model", "rows"), [(Mixed, token_rows()), (Tokens, texts())])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_result_is_the_same(model: type[nn.Module], rows: list[Any], share: float, tmp_path: Path) -> None:
    """To the last bit with everything kept: the very same numbers are added up in the same order."""
    data, found, visits = Counting(rows), [], []
    for budget in (0, 12_000, 1 << 30):
        data.visits = [0] * len(rows)
        found.append(EKFAC(covariance_share=share).fit(ready(model()), data, batch_size=3, memory_budget=budget))
        visits.append(sum(data.visits) - 3)  # the first batch is looked at for the loss
    data.visits = [0] * len(rows)
    some_memory = {"memory_budget": 12_000, "disk_budget": 1 << 20, "scratch": tmp_path}
    found.append(EKFAC(covariance_share=share).fit(ready(model()), data, batch_size=3, **some_memory))
    assert sum(data.visits) - 3 <= visits[1]
    assert not [*tmp_path.iterdir()]
    drawn = len(Subsample(share, "examples", 0).examples(range(len(rows))))
    assert visits[0] == drawn + len(rows)
    assert visits[0] > visits[1] >= visits[2] == len(rows)
    for component in found[0].components:
        gradients = normal(2, *component.shape)
        plain, some, every, filed = (curvature.solve(component, gradients) for curvature in found)
        torch.testing.assert_close(some, plain, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(every, plain, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(filed, plain, rtol=1e-9, atol=1e-12)
        assert torch.equal(every, plain) or share < 1


def test_one_pass_keeps_nothing() -> None:
    one, other = (KFAC().fit(ready(Mixed()), token_rows(), memory_budget=b).state() for b in (0, 1 << 30))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_is_kept_whole_or_not_at_all() -> None:
    records = [factored(2, 3, 4, 5, seed=k) for k in range(3)]
    size = 8 * 2 * 3 * (4 + 5) + 16  # and two ids
    for budget, left, count in ((3 * size, 0, 1), (3 * size - 1, 0, 0), (7 * size, 0, 2)):
        kept = KeptRecords(budget)
        for _ in range(3):
            assert [*kept.keeping(iter(records))] == records
        assert kept.memory.left == left
        assert len([*kept]) == count
        assert kept.ids == ({0, 1} if count else set())


def test_shared_inputs_are_counted_once() -> None:
    one = factored(2, 3, 4, 5)
    two = replace(factored(2, 3, 4, 5, seed=9), inputs=one.inputs)
    kept = KeptRecords(1000)
    assert len([*kept.keeping([one, two])]) == 2
    assert kept.memory.left == 1000 - 8 * 2 * 3 * (4 + 5 + 5) - 2 * 16


@pytest.mark.parametrize("budget", [-1, 1.5, "1GB", True])
def test_a_budget_is_checked(budget: Any) -> None:
    with pytest.raises(ValueError, match=r"`fit\(memory_budget=.*\)`: expected a number of bytes, an int >= 0"):
        KFAC().fit(ready(Mixed()), token_rows(), memory_budget=budget)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_files_give_back_the_very_same_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    one = factored(2, 3, 4, 5, mask=torch.tensor([[True, True, False], [True] * 3]))
    one = replace(one, inputs=one.inputs.to(dtype).mT.contiguous().mT, gradients=one.gradients.to(dtype))
    other = replace(factored(2, 3, 4, 6, seed=2), ids=one.ids, inputs=one.inputs)
    both = SumRecord(one.ids, (one, DenseRecord(one.ids, normal(2, 7))))
    with KeptRecords(0, 10_000, tmp_path) as kept:
        assert [*kept.keeping([one, other, both])] == [one, other, both]
        assert kept.ids == {0, 1}
        assert len([*tmp_path.rglob("*.safetensors")]) == 4  # inputs once, although three records have them
        [batch] = kept
        a, b, total = batch
        c, d = total.parts
        assert a.inputs is b.inputs is c.inputs
        assert a.ids is b.ids
        for found, expected in ((a, one), (b, other), (c, one)):
            assert torch.equal(found.inputs, expected.inputs)
            assert torch.equal(found.gradients, expected.gradients)
            assert found.gradients.dtype == expected.gradients.dtype
        assert a.mask is one.mask
        assert torch.equal(d.values, both.parts[1].values)
    assert not [*tmp_path.iterdir()]


def test_a_batch_is_in_files_whole_or_not_at_all(tmp_path: Path) -> None:
    records = [factored(2, 3, 4, 5, seed=k) for k in range(3)]
    size = 8 * 2 * 3 * (4 + 5)
    for budget, count in ((3 * size, 1), (3 * size - 1, 0), (7 * size, 2)):
        with KeptRecords(0, budget, tmp_path) as kept:
            for _ in range(4):
                assert [*kept.keeping(iter(records))] == records
            assert len([*kept]) == count
            assert len([*tmp_path.rglob("*.safetensors")]) == 6 * count


def test_files_are_removed_after_a_failure(tmp_path: Path) -> None:
    rows = token_rows()

    def losses(model: nn.Module, batch: Any) -> Any:
        assert [*tmp_path.iterdir()]
        raise RuntimeError("stop")

    with pytest.raises(ValueError, match="RuntimeError: stop"):
        EKFAC(fisher="empirical").fit(ready(Mixed()), rows, losses, disk_budget=1 << 20, scratch=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_room_for_files_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`fit\(scratch='.*gone'\)`: expected a folder"):
        EKFAC().fit(ready(Mixed()), token_rows(), disk_budget=1, scratch=tmp_path / "gone")
    with pytest.raises(ValueError, match=r"`fit\(disk_budget=10{18}\)`: .* bytes left. Expected a smaller"):
        EKFAC().fit(ready(Mixed()), token_rows(), disk_budget=10**18, scratch=tmp_path)
    with pytest.raises(ValueError, match=r"`fit\(disk_budget=-1\)`: expected a number of bytes"):
        EKFAC().fit(ready(Mixed()), token_rows(), disk_budget=-1)
