from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.capture.record import DenseRecord, FactoredRecord, IndexedRecord, LayerRecord, SumRecord
from lightning_influence.curvature import blocks, common
from lightning_influence.curvature.blocks import (
    DENSE_LIMIT,
    Block,
    DenseBlock,
    DiagonalBlock,
    KroneckerBlock,
    block_for,
    load_block,
)
from lightning_influence.curvature.common import add_gram, mirrored
from tests import oracles
from tests.curvature.models import normal


def factored(n: int, t: int, i: int, o: int, seed: int = 0, mask: Tensor | None = None) -> FactoredRecord:
    gradients = normal(n, t, o, seed=seed + 1)
    if mask is not None:
        gradients = gradients * mask[..., None]  # nothing flows to padding
    return FactoredRecord(torch.arange(n), normal(n, t, i, seed=seed), gradients, mask)


def fit(block: Block, record: LayerRecord, second: bool) -> Block:
    for again in (False, True)[: 1 + second]:
        for part in (record.narrow(0, 1), record.narrow(1, len(record))) if len(record) > 1 else (record,):
            block.update(part, again)
        block.finish(again)
    return block


def dense(block: Block, shape: tuple[int, ...]) -> Tensor:
    """The block as a matrix, read off the damped inverse."""
    size = torch.Size(shape).numel()
    damping = 0.5 + float(block.eigenvalues().mean())
    solved = block.solve(torch.eye(size).double().reshape(size, *shape), damping).reshape(size, size)
    return torch.linalg.inv(solved) - damping * torch.eye(size).double()


def factors(record: FactoredRecord) -> list[tuple[Tensor, Tensor]]:
    mask = torch.ones(record.inputs.shape[:2]).bool() if record.mask is None else record.mask
    return [(a[m], s[m]) for a, s, m in zip(record.inputs, record.gradients, mask, strict=True)]


SIZES = [(1, 1, 1, 1), (6, 1, 3, 4), (7, 5, 3, 2), (5, 2, 6, 5), (4, 9, 2, 2), (3, 4, 1, 5)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("second", [False, True])
def test_a_kronecker_block_is_the_formula(sizes: tuple[int, int, int, int], second: bool) -> None:
    record = factored(*sizes)
    found = dense(fit(KroneckerBlock(), record, second), (sizes[3], sizes[2]))
    truth = oracles.ekfac(factors(record), record.example_gradients()) if second else oracles.kfac(factors(record))
    torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("max_width", [None, 3])
def test_what_multiplies_many_batches_is_laid_out_for_it(max_width: int | None) -> None:
    """Else each product with a batch of training gradients begins with a copy of all queries."""
    record = factored(7, 5, 4, 6)
    block = fit(KroneckerBlock(max_width), record, True)
    assert block.solve(record.example_gradients(), 0.1).is_contiguous()
    assert block.solve_rotated(block.rotated(record), 0.1).is_contiguous()


@pytest.mark.parametrize("rotated", [1, 6, 1 << 20])
@pytest.mark.parametrize("sizes", [(7, 2, 5, 6), (7, 40, 2, 3)])
def test_squares_are_the_same_however_they_are_cut(
    rotated: int, sizes: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few positions rotate the factors, many the gradients."""
    record = factored(*sizes)
    truth = fit(KroneckerBlock(), record, True).eigenvalues()
    monkeypatch.setattr(blocks, "ROTATED", rotated)
    torch.testing.assert_close(fit(KroneckerBlock(), record, True).eigenvalues(), truth)


def test_padding_does_not_count() -> None:
    mask = torch.arange(6) < torch.tensor([[6], [2], [5], [1]])
    record = factored(4, 6, 3, 2, mask=mask)
    for second in (False, True):
        found = dense(fit(KroneckerBlock(), record, second), (2, 3))
        padded = FactoredRecord(record.ids, torch.where(mask[..., None], record.inputs, 99.0), record.gradients, mask)
        torch.testing.assert_close(dense(fit(KroneckerBlock(), padded, second), (2, 3)), found)
    truth = oracles.ekfac(factors(record), record.example_gradients())
    torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-8)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_the_second_pass_comes_closer(n: int, t: int, i: int, o: int, seed: int) -> None:
    """Lambda is the best diagonal in the basis (George et al. 2018), so EK-FAC is never farther from the truth."""
    record = factored(n, t, i, o, seed)
    truth = oracles.fisher(record.example_gradients().flatten(1))
    distances = [torch.linalg.norm(dense(fit(KroneckerBlock(), record, k), (o, i)) - truth) for k in (False, True)]
    assert distances[1] <= distances[0] * (1 + 1e-9) + 1e-9
    ekfac = dense(fit(KroneckerBlock(), record, True), (o, i))
    torch.testing.assert_close(ekfac.trace(), truth.trace(), rtol=1e-7, atol=1e-7)


def test_first_pass_counts_the_positions_of_an_example() -> None:
    """With independent positions E[g gᵀ] is the mean number of positions times S ⊗ A: all signs, each once."""
    a, s = normal(3, seed=1), normal(2, seed=2)
    rows = [
        (torch.stack([w * a, x * a]), torch.stack([y * s, z * s]))
        for w, x, y, z in itertools.product((1.0, -1.0), repeat=4)
    ]
    inputs, gradients = (torch.stack(parts) for parts in zip(*rows, strict=True))
    record = FactoredRecord(torch.arange(len(rows)), inputs, gradients)
    truth = oracles.fisher(record.example_gradients().flatten(1))
    torch.testing.assert_close(truth, 2 * torch.kron(torch.outer(s, s), torch.outer(a, a)))
    for second in (False, True):
        torch.testing.assert_close(dense(fit(KroneckerBlock(), record, second), (2, 3)), truth, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("second", [False, True])
def test_a_small_block_without_structure_is_exact(second: bool) -> None:
    record = DenseRecord(torch.arange(9), normal(9, 2, 3))
    found = dense(fit(DenseBlock(), record, second), (2, 3))
    torch.testing.assert_close(found, oracles.fisher(record.values.flatten(1)))


@pytest.mark.parametrize("second", [False, True])
def test_a_large_one_is_the_diagonal(second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_influence.capture.record.CHUNK", 12)
    indices = torch.randint(5, (7, 4), generator=torch.Generator().manual_seed(0))
    record = IndexedRecord(torch.arange(7), indices, normal(7, 4, 3), 5)
    found = dense(fit(DiagonalBlock(), record, second), (5, 3))
    truth = oracles.fisher(record.example_gradients().flatten(1))
    torch.testing.assert_close(found, truth.diagonal().diag())


def test_every_record_gets_the_most_exact_block() -> None:
    linear = factored(3, 2, 4, 5)
    table = IndexedRecord(torch.arange(3), torch.zeros(3, 2, dtype=torch.int64), normal(3, 2, 4), 5)
    small, large = (DenseRecord(torch.arange(3), normal(3, k)) for k in (DENSE_LIMIT, DENSE_LIMIT + 1))
    kinds = [KroneckerBlock, DiagonalBlock, DenseBlock, DiagonalBlock, DiagonalBlock]
    records = [linear, table, small, large, SumRecord(linear.ids, (linear, table))]
    assert [type(block_for(record)) for record in records] == kinds


@pytest.mark.parametrize("kind", [KroneckerBlock, DenseBlock, DiagonalBlock])
def test_a_block_comes_back_from_its_tensors(kind: type[Block]) -> None:
    record = factored(5, 1, 3, 2) if kind is KroneckerBlock else DenseRecord(torch.arange(5), normal(5, 2, 3))
    block = fit(kind(), record, True)
    found = load_block({f"{kind.kind}.{key}": value for key, value in block.fitted.items()})
    assert type(found) is kind
    gradients = normal(4, 2, 3)
    assert torch.equal(found.solve(gradients, 0.3), block.solve(gradients, 0.3))


@pytest.mark.parametrize("kind", [KroneckerBlock, DenseBlock, DiagonalBlock])
def test_blocks_keep_the_precision_of_the_gradients(kind: type[Block]) -> None:
    record = factored(5, 2, 3, 2) if kind is KroneckerBlock else DenseRecord(torch.arange(5), normal(5, 2, 3))
    if isinstance(record, FactoredRecord):
        narrow: LayerRecord = FactoredRecord(record.ids, record.inputs.float(), record.gradients.float())
    else:
        narrow = DenseRecord(record.ids, record.values.float())
    gradients = normal(4, 2, 3)
    found = fit(kind(), narrow, True).solve(gradients.float(), 0.3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), fit(kind(), record, True).solve(gradients, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d", [1, 3, 7, 8, 9])
def test_half_of_a_gram_matrix_is_enough(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "SPLIT", 3)
    rows, total = normal(5, d), torch.zeros(d, d).double()
    add_gram(total, rows[:2])
    add_gram(total, rows[2:])
    torch.testing.assert_close(mirrored(total), rows.T @ rows)
