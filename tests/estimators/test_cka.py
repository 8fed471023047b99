from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_influence.capture import Component, find_components
from lightning_influence.capture.record import DenseRecord, FactoredRecord
from lightning_influence.estimators import cka
from lightning_influence.estimators.cka import CKA, AlignedRecord, aligned
from tests import oracles
from tests.curvature.models import Mixed, loss_of, mlp, normal, points, ready, token_rows


def centred_kernel_alignment(x: Tensor, y: Tensor) -> float:
    """With Gram matrices centred by H = I - 11^T/n: tr(KHLH) / sqrt(tr(KHKH) tr(LHLH))."""
    n = len(x)
    h = torch.eye(n).double() - torch.ones(n, n).double() / n
    k, other = x @ x.T, y @ y.T

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        return (a @ h @ b @ h).trace()

    return float(hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt())


def linear(rows: int, columns: int) -> Component:
    return Component("layer", "linear", (), ("weight",), (rows, columns))


SIDES = st.integers(2, 6)


@given(rows=SIDES, columns=st.integers(1, 6), seed=st.integers(0, 99), positions=st.integers(1, 4))
def test_alignment_in_closed_form(rows: int, columns: int, seed: int, positions: int) -> None:
    left = normal(3, rows, columns, seed=seed)
    inputs, gradients = normal(4, positions, columns, seed=seed + 1), normal(4, positions, rows, seed=seed + 2)
    record = FactoredRecord(torch.arange(4), inputs, gradients)
    found = AlignedRecord(record.ids, linear(rows, columns), record).contract(aligned(left))
    expected = [[centred_kernel_alignment(x, y) for y in record.example_gradients()] for x in left]
    torch.testing.assert_close(found, torch.tensor(expected).double())


@given(rows=SIDES, columns=SIDES, seed=st.integers(0, 99), scale=st.sampled_from([-1e-160, -1.0, 1e-9, 1e150]))
def test_what_does_not_matter(rows: int, columns: int, seed: int, scale: float) -> None:
    """Length and sign, a rotation of the columns, an offset that all rows share; the order of the two sides."""
    x, y = normal(1, rows, columns, seed=seed), normal(1, rows, columns, seed=seed + 1)

    def alignment(a: Tensor, b: Tensor) -> Tensor:
        return AlignedRecord(torch.arange(1), linear(rows, columns), DenseRecord(torch.arange(1), b)).contract(
            aligned(a)
        )

    expected = alignment(x, y)
    rotation = torch.linalg.qr(normal(columns, columns, seed=seed + 2)).Q
    for other in (scale * y, y @ rotation, y + normal(1, 1, columns, seed=seed + 3)):
        torch.testing.assert_close(alignment(x, other), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(alignment(y, x), expected)
    torch.testing.assert_close(alignment(x, x), torch.ones(1, 1).double())
    assert -1e-12 < float(expected) < 1 + 1e-12


@pytest.mark.parametrize(("rows", "columns"), [(12, 2), (2, 12), (12, 9)])
def test_both_ways_of_computing_give_the_same(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = aligned(normal(5, rows, columns)), normal(6, rows, columns, seed=1)
    record = AlignedRecord(torch.arange(6), linear(rows, columns), DenseRecord(torch.arange(6), right))
    found = []
    for way in (True, False):
        monkeypatch.setattr(cka, "_by_kernels", lambda *sizes, way=way: way)
        found.append(record.contract(left))
    torch.testing.assert_close(*found)


def test_the_cheaper_way_is_taken() -> None:
    assert cka._by_kernels(1, 1, 256, 1024)
    assert cka._by_kernels(10, 32, 1024, 256)
    assert not cka._by_kernels(1, 32, 1024, 256)
    assert not cka._by_kernels(10, 32, 8000, 256)  # a table's kernels do not fit


def test_scores_are_sums_over_the_components() -> None:
    """A linear layer's rows are its outputs, a norm's its channels, a table's its entries."""
    model = ready(Mixed())
    queries, train = token_rows(3, seed=3), token_rows(4)
    names = {"up": ["up.weight", "up.bias"], "norm": ["norm.weight", "norm.bias"], "embedding": ["embedding.weight"]}
    parameters = dict(model.named_parameters())

    def matrices(data: list[Any], name: str) -> list[Tensor]:
        own = {key: parameters[key] for key in names[name]}
        found = oracles.example_gradients(own, lambda k: loss_of(model, data[k], k), len(data))
        return [torch.cat([g[k].reshape(len(g[k]), -1) for g in found.values()], dim=1) for k in range(len(data))]

    apart = CKA(model).score(queries, train, per_component=True)
    for name in names:
        pairs = [[centred_kernel_alignment(x, y) for y in matrices(train, name)] for x in matrices(queries, name)]
        torch.testing.assert_close(apart.total([name]), torch.tensor(pairs).double())


def test_an_example_is_alike_to_itself() -> None:
    data = points(5)
    values = CKA(mlp()).score(data, data, per_component=True).values
    torch.testing.assert_close(values.diagonal(dim1=1, dim2=2), torch.ones(2, 5).double())
    assert torch.equal(CKA(mlp(), normalise=True).score(data, data, per_component=True).values, values)


def test_gradients_without_anything_to_align() -> None:
    """All rows the same: one output."""
    model = mlp(nn.Linear(3, 1))
    data = [(x, y.double() + 0.5) for x, y in points(4)]
    assert torch.equal(CKA(model).score(data, data).values, torch.zeros(4, 4).double())
    assert torch.equal(aligned(torch.full((1, 7, 3), 0.1)), torch.zeros(1, 7, 3))
    [component] = find_components(model)
    assert component.shape == (1, 4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_sign_is_not_told(batch_size: int) -> None:
    values = CKA(mlp(), batch_size=batch_size).score(points(4, seed=3), points(9)).values
    assert (values >= 0).all()
    assert (values <= 2 + 1e-12).all()
