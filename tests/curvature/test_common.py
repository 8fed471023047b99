from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_influence import EKFAC, find_components
from lightning_influence.curvature import blocks, common
from lightning_influence.curvature.common import Common, back, mirrored, rotate, shared_out
from tests.capture import models
from tests.curvature.models import normal


def texts(n: int = 6) -> list[dict[str, Tensor]]:
    batch = models.text(n)
    return [{key: value[k] for key, value in batch.items()} for k in range(n)]


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is found again."""
    monkeypatch.setattr(Common, "next_batch", lambda self: None)
    for name in ("add_input_grams", "rotated", "eigenvectors"):
        monkeypatch.setattr(Common, name, lambda self, *args, name=name: getattr(FRESH(), name)(*args))


class FRESH:
    """A `Common` that has seen nothing, for every question."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *args: ORIGINAL[name](Common(), *args)


ORIGINAL = {name: getattr(Common, name) for name in ("add_input_grams", "rotated", "eigenvectors")}


@pytest.mark.parametrize("batch_size", [2, 6])
@pytest.mark.parametrize("bias", [False, True])
def test_sharing_changes_no_factor(batch_size: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.llama(attention_bias=bias)
    shared = EKFAC().fit(model, texts(), components="all-linear", batch_size=batch_size).state()
    apart(monkeypatch)
    alone = EKFAC().fit(model, texts(), components="all-linear", batch_size=batch_size).state()
    assert shared.keys() == alone.keys()
    for name, value in shared.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-9, atol=1e-12)


def test_one_input_is_worked_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k, v have one input, gate and up another, o and down their own: 4 of 7."""
    grams: list[int] = []
    original = common.add_gram
    monkeypatch.setattr(common, "add_gram", lambda total, rows: (grams.append(1), original(total, rows))[1])
    add = lambda totals, rows: [original(total, rows) for total in totals]  # noqa: E731
    monkeypatch.setattr(blocks, "add_grams", add)  # of output gradients
    decomposed: list[int] = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (decomposed.append(1), eigh(matrix))[1])
    model = models.llama(num_hidden_layers=1)
    assert len(find_components(model, "all-linear")) == 7
    EKFAC().fit(model, texts(), components="all-linear", batch_size=2)
    assert len(grams) == 4 * 3
    assert len(decomposed) == 4 + 7


@given(rows=st.lists(st.integers(1, 4), min_size=1, max_size=4), lend=st.booleans())
def test_grams_are_those_of_each_batch(rows: list[int], lend: bool) -> None:
    """Whether another layer has the same input, from the first batch on or not."""
    shared, first, second = Common(), torch.zeros(3, 3).double(), torch.zeros(3, 3).double()
    inputs = [normal(2, t, 3, seed=t) for t in rows]
    for k, each in enumerate(inputs):
        shared.next_batch()
        shared.add_input_grams([first], each, None)
        shared.add_input_grams([second], each if lend or k % 2 else each.clone(), None)
    expected = sum(each.reshape(-1, 3).mT @ each.reshape(-1, 3) for each in inputs)
    torch.testing.assert_close(mirrored(first), expected)
    torch.testing.assert_close(mirrored(second), expected)


def test_a_basis_is_that_of_its_matrix_and_count() -> None:
    shared = Common()
    matrix = normal(4, 4).mT @ normal(4, 4)
    values, vectors = shared.eigenvectors(matrix, 2.0)
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.mT, matrix / 2)
    assert shared.eigenvectors(matrix.clone(), 2.0)[1] is vectors
    assert shared.eigenvectors(matrix, 3.0)[1] is not vectors
    assert shared.eigenvectors(2 * matrix, 2.0)[1] is not vectors


def test_rotations_are_found_by_input_and_basis() -> None:
    shared, inputs, one, other = Common(), normal(2, 3, 4), (normal(4, 4, seed=1),), (normal(4, 4, seed=2),)
    first = shared.rotated(inputs, one)
    torch.testing.assert_close(first, inputs @ one[0])
    assert shared.rotated(inputs, one) is first
    torch.testing.assert_close(shared.rotated(inputs, other), inputs @ other[0])
    torch.testing.assert_close(shared.rotated(inputs.clone(), one), first)
    shared.next_batch()
    assert shared.rotated(inputs, one) is not first


@pytest.mark.parametrize("sizes", [(16,), (17,), (3, 2), (16, 1, 20)])
def test_rotations_are_those_of_the_diagonal_blocks(sizes: tuple[int, ...]) -> None:
    basis = tuple(normal(d, d, seed=d) for d in sizes)
    rows, dense = normal(2, 3, sum(sizes)), torch.block_diag(*basis)
    torch.testing.assert_close(rotate(rows, basis), rows @ dense)
    torch.testing.assert_close(Common().rotate(rows, basis), rows @ dense)
    torch.testing.assert_close(back(rows, basis), rows @ dense.mT)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 5))
def test_work_is_shared_out_evenly(costs: list[int], ranks: int) -> None:
    """No rank has more than the fair share and one piece of work (Graham 1969)."""
    named = {str(k): cost for k, cost in enumerate(costs)}
    owners = shared_out(named, ranks)
    load = [sum(named[k] for k, owner in owners.items() if owner == rank) for rank in range(ranks)]
    assert owners.keys() == named.keys()
    assert sum(load) == sum(costs)
    assert max(load) <= sum(costs) / ranks + max(costs)


def test_ranks_decompose_their_share_once() -> None:
    """Summed over ranks, what each did alone; equal factors are one piece of work."""
    one, other = (normal(4, 4, seed=k) @ normal(4, 4, seed=k).mT for k in (1, 2))
    factors = {"a": (one, 2.0), "b": (other, 2.0), "c": (one.clone(), 2.0), "d": (one.clone(), 3.0)}
    parts = [Common() for _ in range(2)]
    found = [part.decompose(factors, rank, 2) for rank, part in enumerate(parts)]
    assert found[0].keys() == found[1].keys() == {f"{k}/{what}" for k in "abd" for what in ("values", "vectors")}
    for key, value in found[0].items():
        assert bool(value.any()) != bool(found[1][key].any())
        total = value + found[1][key]
        for part in found:
            part[key].copy_(total)
    for total, count in factors.values():
        for part in parts:
            values, vectors = part.eigenvectors(total, count)
            assert torch.equal(values, Common().eigenvectors(total, count)[0])
            assert torch.equal(vectors, Common().eigenvectors(total, count)[1])


def test_layers_of_two_positions_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two-dimensional inputs go another way through the second pass."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    model = Heads().double()
    rows = [(normal(3, seed=k), torch.tensor(k % 4)) for k in range(8)]
    shared = EKFAC(fisher="empirical").fit(model, rows, batch_size=4).state()
    apart(monkeypatch)
    alone = EKFAC(fisher="empirical").fit(model, rows, batch_size=4).state()
    for name, value in shared.items():
        torch.testing.assert_close(value, alone[name])
