from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.capture.record import DenseRecord, FactoredRecord, IndexedRecord, LayerRecord, SumRecord
from lightning_influence.estimators.compact import READ, Compactor, Kept, Shape, shapes_of


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def batch(n: int, t: int, seed: int = 0, inputs: Tensor | None = None) -> list[LayerRecord]:
    """A factored component, a second on the same input, an embedding, a tied one, and a vector."""
    torch.manual_seed(seed)
    ids = torch.arange(n)
    a = normal(n, t, 6) if inputs is None else inputs
    tokens = torch.randint(9, (n, t))
    tied = SumRecord(ids, (IndexedRecord(ids, tokens, normal(n, t, 6), 9), FactoredRecord(ids, a, normal(n, t, 9))))
    return [
        FactoredRecord(ids, a, normal(n, t, 8)),
        FactoredRecord(ids, a, normal(n, t, 7)),
        IndexedRecord(ids, tokens, normal(n, t, 5), 9),
        tied,
        DenseRecord(ids, normal(n, 3, 4)),
    ]


def idle(record: FactoredRecord, rows: list[list[int]]) -> FactoredRecord:
    """The record with output gradients of zero at some positions of each example."""
    gradients = record.gradients.clone()
    for k, positions in enumerate(rows):
        gradients[k, positions] = 0
    return FactoredRecord(record.ids, record.inputs, gradients, record.mask)


def gradients(kept: Kept) -> list[Tensor]:
    return [record.example_gradients()[0] for record in kept.records]


@pytest.mark.parametrize("length", [2, 4, 60])  # factors, a choice by pairs, matrices
@given(n=st.integers(1, 4), pairs=st.sampled_from([1.0, 5.0, 1e4]))
def test_every_form_is_the_same_gradient(length: int, n: int, pairs: float) -> None:
    records = batch(n, length)
    compactor = Compactor.of(shapes_of(batch(1, length), length, length), length, pairs)
    found = compactor.take(records)
    assert len(found) == n
    for k, kept in enumerate(found):
        for own, record in zip(gradients(kept), records, strict=True):
            torch.testing.assert_close(own, record.example_gradients()[k])
    some = compactor.take(records, [n - 1])
    assert all(torch.equal(a, b) for a, b in zip(gradients(some[0]), gradients(found[-1]), strict=True))


def test_forms_follow_the_work_they_save() -> None:
    """t i o + m i o against m t² (o + i): few positions or few pairs are for factors."""
    square = Shape(1, True, 576, 576)
    assert not square.worth_multiplying(100, 2.5)
    assert square.worth_multiplying(100, 10)
    assert not square.worth_multiplying(10, 1e9)
    shared = Shape(1, True, 576, 576, sharing=3)
    assert square.worth_multiplying(100, 5)
    assert not shared.worth_multiplying(100, 5)
    assert not Shape(1, False, 0, 10).worth_multiplying(100, 1e9)
    t, m, io = 50.0, 7.0, 576 * 576
    assert square.worth_multiplying(t, m) == (t * io + READ * m * io < m * t * t * 2 * 576)


def test_long_examples_are_kept_as_matrices_where_those_are_smaller() -> None:
    [record, *_] = batch(1, 40)
    compactor = Compactor.of(shapes_of([record], 40, 40), 2, 0)
    assert compactor.multiplied == (False,)
    [kept] = compactor.take([record])
    assert isinstance(kept.records[0], DenseRecord)
    [short] = compactor.take([batch(1, 3)[0]])
    assert isinstance(short.records[0], FactoredRecord)


def test_idle_positions_are_left_out() -> None:
    [record, *_] = batch(2, 5)
    part = idle(record, [[0, 3], [0, 1, 2, 3, 4]])
    first, second = Compactor((Shape(1, True, 6, 8),), (False,)).take([part])
    assert first.records[0].sizes == (1, 3, 6, 8)
    assert second.records[0].sizes[1] == 0
    torch.testing.assert_close(gradients(first)[0], part.example_gradients()[0])
    assert torch.equal(gradients(second)[0], torch.zeros(8, 6, dtype=torch.float64))


def test_components_that_multiply_one_input_keep_it_once() -> None:
    records = batch(3, 4)
    shapes = shapes_of(batch(1, 4), 4, 4)
    assert [shape.sharing for shape in shapes] == [2, 2, 1, 1, 1]
    kept = Compactor(shapes, (False,) * 5).take(records)
    for example in kept:
        assert example.records[0].inputs is example.records[1].inputs
    assert kept[0].records[0].inputs is not kept[1].records[0].inputs
    apart = [records[0], idle(records[1], [[0], [], []])]
    first, second, _ = Compactor(shapes[:2], (False, False)).take(apart)
    assert first.records[0].inputs is not first.records[1].inputs  # at other positions
    assert second.records[0].inputs is second.records[1].inputs


def test_what_is_kept_does_not_keep_the_batch() -> None:
    records = batch(50, 4)
    kept = Compactor(shapes_of(batch(1, 4), 4, 4), (False,) * 5).take(records, [7])[0]
    for record in kept.records:
        parts = record.parts if isinstance(record, SumRecord) else (record,)
        numbers = [(k, value) for part in parts for k, value in vars(part).items() if isinstance(value, Tensor)]
        assert all(value.untyped_storage().nbytes() == value.nbytes for k, value in numbers if k != "ids")


@given(t=st.integers(2, 30), pairs=st.sampled_from([1.0, 50.0]), half=st.booleans())
def test_memory_is_foreseen(t: int, pairs: float, half: bool) -> None:
    dtype = torch.float16 if half else None
    compactor = Compactor.of(shapes_of(batch(1, 7), 7, 7), 7, pairs, dtype)
    [kept] = compactor.take(batch(1, t, seed=1))
    assert 0 < kept.bytes <= compactor.bytes(t, 8)
    assert kept.bytes > 0.5 * compactor.bytes(t, 8)


def test_half_precision_is_half_the_memory() -> None:
    records = [record for record in batch(1, 3) if not isinstance(record, IndexedRecord | SumRecord)]
    shapes = shapes_of(records, 3, 3)
    full, half = (Compactor(shapes, (False,) * 3, dtype).take(records)[0] for dtype in (None, torch.float16))
    assert full.bytes == 4 * half.bytes
    assert {record.gradients.dtype for record in half.records[:2]} == {torch.float16}
    for a, b in zip(gradients(full), half.records, strict=True):
        torch.testing.assert_close(b.example_gradients()[0].double(), a, rtol=2e-2, atol=2e-2)


def test_layers_with_positions_of_their_own_do_not_scale() -> None:
    ids = torch.zeros(1, dtype=torch.int64)
    patches = FactoredRecord(ids, normal(1, 49, 6), normal(1, 49, 8))
    pooled = FactoredRecord(ids, normal(1, 1, 6), normal(1, 1, 8))
    tokens = FactoredRecord(ids, normal(1, 12, 6), normal(1, 12, 8))
    found = [(shape.positions, shape.scales) for shape in shapes_of([patches, pooled, tokens], 10, 12)]
    assert found == [(49, False), (1, False), (1, True)]
