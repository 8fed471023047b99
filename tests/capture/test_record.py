from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.capture import record as module
from lightning_influence.capture.record import (
    DenseRecord,
    FactoredRecord,
    IndexedRecord,
    LayerRecord,
    SumRecord,
    merged,
)

few = st.integers(1, 4)
positions = st.integers(1, 12)
widths = st.sampled_from([1, 2, 7, 30])
kinds = st.sampled_from(["factored", "indexed", "dense", "sum"])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def factored(n: int, t: int, i: int, o: int) -> FactoredRecord:
    return FactoredRecord(torch.arange(n), normal(n, t, i), normal(n, t, o))


def indexed(n: int, t: int, rows: int, d: int) -> IndexedRecord:
    return IndexedRecord(torch.arange(n), torch.randint(rows, (n, t)), normal(n, t, d), rows)


def build(kind: str, n: int, t: int, i: int, o: int) -> LayerRecord:
    """A record of gradients of shape (o, i)."""
    torch.manual_seed(n + 10 * t)
    if kind == "factored":
        return factored(n, t, i, o)
    if kind == "indexed":
        return indexed(n, t, o, i)
    if kind == "dense":
        return DenseRecord(torch.arange(n), normal(n, o, i))
    return SumRecord(torch.arange(n), (factored(n, t, i, o), indexed(n, t, o, i)))


@contextmanager
def chunks_of(elements: int) -> Iterator[None]:
    before, module.CHUNK = module.CHUNK, elements
    try:
        yield
    finally:
        module.CHUNK = before


@given(kind=kinds, other=kinds, n=few, m=few, t=positions, u=positions, i=widths, o=widths, small=st.booleans())
def test_products_equal_those_of_the_gradients(
    kind: str, other: str, n: int, m: int, t: int, u: int, i: int, o: int, small: bool
) -> None:
    left, right = build(kind, n, t, i, o), build(other, m, u, i, o)
    a, b = left.example_gradients().flatten(1), right.example_gradients().flatten(1)
    with chunks_of(8 if small else module.CHUNK):
        torch.testing.assert_close(left.dot_products(right), a @ b.mT)
        torch.testing.assert_close(left.contract(right.example_gradients()), b @ a.mT)
        torch.testing.assert_close(left.squared_norms(), a.square().sum(1))
        torch.testing.assert_close(torch.cat([p.example_gradients() for p in left.chunks()]).flatten(1), a)
        assert torch.equal(torch.cat([part.ids for part in left.chunks()]), left.ids)


@given(kind=kinds, n=few, t=positions, i=widths, o=widths, data=st.data())
def test_narrow_takes_examples(kind: str, n: int, t: int, i: int, o: int, data: st.DataObject) -> None:
    record = build(kind, n, t, i, o)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    part = record.narrow(start, stop)
    assert (len(part), part.ids.tolist()) == (stop - start, list(range(start, stop)))
    assert part.example_numel == record.example_numel == o * i
    torch.testing.assert_close(part.example_gradients(), record.example_gradients()[start:stop])


@given(first=kinds, second=kinds, third=kinds, n=few, t=positions, u=positions, i=widths, o=widths)
def test_merged_records_add_up(first: str, second: str, third: str, n: int, t: int, u: int, i: int, o: int) -> None:
    records = [build(first, n, t, i, o), build(second, n, u, i, o), build(third, n, t, i, o)]
    both = merged(records)
    expected = torch.stack([record.example_gradients() for record in records]).sum(0)
    torch.testing.assert_close(both.example_gradients(), expected)
    torch.testing.assert_close(both.squared_norms(), expected.square().sum((1, 2)))
    assert torch.equal(both.ids, torch.arange(n))


def test_records_of_one_kind_stay_of_that_kind() -> None:
    for kind, cls in {"factored": FactoredRecord, "indexed": IndexedRecord, "dense": DenseRecord}.items():
        assert type(merged([build(kind, 2, 3, 2, 2), build(kind, 2, 4, 2, 2)])) is cls
        assert type(merged([build(kind, 2, 3, 2, 2)])) is cls
    assert type(merged([build("indexed", 2, 3, 2, 2), build("factored", 2, 4, 2, 2)])) is SumRecord


def test_masks_are_joined_and_narrowed() -> None:
    whole, masked = factored(2, 3, 4, 5), factored(2, 2, 4, 5)
    masked = FactoredRecord(masked.ids, masked.inputs, masked.gradients, torch.tensor([[True, False], [True, True]]))
    assert whole.joined(whole).mask is None
    assert whole.joined(masked).mask.tolist() == [[True] * 4 + [False], [True] * 5]
    assert masked.joined(whole).mask.tolist() == [[True, False, True, True, True], [True] * 5]
    assert masked.narrow(1, 2).mask.tolist() == [[True, True]]


# Which way is taken


def formed(record: LayerRecord, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the gradients that get formed from now on."""
    sizes: list[int] = []
    cls = type(record)
    original = cls.example_gradients

    def counted(self: LayerRecord) -> Tensor:
        sizes.append(len(self))
        return original(self)

    monkeypatch.setattr(cls, "example_gradients", counted)
    return sizes


@pytest.mark.parametrize(("t", "materialised"), [(1, False), (4, False), (64, True)])
def test_dot_products_take_the_cheaper_way(t: int, materialised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """n m t² (i + o) multiplications against (n + m) t i o + n m i o."""
    left, right = factored(3, t, 32, 32), factored(2, t, 32, 32)
    sizes = formed(left, monkeypatch)
    left.dot_products(right)
    assert sizes == ([3, 2] if materialised else [])


@pytest.mark.parametrize(("q", "t", "materialised"), [(1, 9, False), (9, 1, False), (2, 2, False), (2, 3, True)])
def test_contractions_take_the_cheaper_way(q: int, t: int, materialised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """q n t i o multiplications against n t i o + q n i o."""
    record = factored(3, t, 5, 6)
    sizes = formed(record, monkeypatch)
    record.contract(normal(q, 6, 5))
    assert sizes == ([3] if materialised else [])


@pytest.mark.parametrize(("q", "t"), [(9, 1), (1, 3), (0, 1)])
@pytest.mark.parametrize(("elements", "parts"), [(4 * 6 * 3, [4, 1]), (2 * 6 * 3, [2, 2, 1]), (1, [1] * 5)])
def test_many_matrices_are_split_rather_than_the_examples(
    q: int, t: int, elements: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", elements)
    monkeypatch.setattr(module, "TALL", 4)
    record, matrices, sizes = factored(5, t, 5, 6), normal(q, 6, 5), []
    whole = matrices.flatten(1) @ record.example_gradients().flatten(1).mT
    narrow = FactoredRecord.narrow

    def counted(self: FactoredRecord, start: int, stop: int) -> FactoredRecord:
        sizes.append(stop - start)
        return narrow(self, start, stop)

    monkeypatch.setattr(FactoredRecord, "narrow", counted)
    torch.testing.assert_close(record.contract(matrices), whole)
    assert sizes == (parts if t == 3 or elements == 1 else [4, 1])


@pytest.mark.parametrize(("t", "materialised"), [(1, False), (15, False), (16, True)])
def test_norms_take_the_cheaper_way(t: int, materialised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """n t² (i + o) multiplications against n t i o."""
    record = factored(3, t, 32, 32)
    sizes = formed(record, monkeypatch)
    record.squared_norms()
    assert sizes == ([3] if materialised else [])


@pytest.mark.parametrize(("t", "rows", "materialised"), [(1, 50, False), (2, 50, False), (20, 50, True)])
def test_embeddings_are_formed_when_many_positions_meet(
    t: int, rows: int, materialised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = indexed(3, t, rows, 4), indexed(2, t, rows, 4)
    sizes = formed(left, monkeypatch)
    left.dot_products(right)
    assert sizes == ([3] if materialised else [])
    left.squared_norms()
    left.contract(normal(2, rows, 4))
    assert sizes == ([3] if materialised else [])


def test_large_gradients_are_formed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    record = factored(5, 40, 6, 6)
    sizes = formed(record, monkeypatch)
    with chunks_of(2 * 36):
        record.squared_norms()
    assert sizes == [3, 2]


@pytest.mark.parametrize("n", [1, 5, 16, 33])
@pytest.mark.parametrize("numel", [1, 7, 64, 500])
def test_pieces_are_about_equal_and_about_as_large_as_allowed(
    n: int, numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)
    whole = DenseRecord(torch.arange(n), torch.zeros(n, numel))
    pieces = whole.chunks()
    assert torch.equal(torch.cat([piece.ids for piece in pieces]), whole.ids)
    assert max(map(len, pieces)) * numel <= max(1.5 * 64 + numel, numel)
    assert len(pieces) == 1 or min(map(len, pieces[:-1])) == max(map(len, pieces))
