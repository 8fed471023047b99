from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.projections import LoGra
from lightning_influence.projections import logra as module
from lightning_influence.projections.base import matrix_shape
from lightning_influence.projections.logra import split
from tests.projections.cases import SHAPES, component, record


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("dimensions", [6, (2, 3), (100, 100)])
@pytest.mark.parametrize("block", [1, 17, 10**6])
def test_both_factors_by_their_matrices(
    case: str, dimensions: Any, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    shape, kind = SHAPES[case]
    one, found = component("layer", shape), record(shape, kind)
    projection = LoGra(dimensions).start([one])
    outputs, inputs = (projection.matrix(one, side).double() for side in ("outputs", "inputs"))
    assert (len(outputs), len(inputs)) == projection.sides["layer"]
    gradients = found.example_gradients().reshape(len(found), *matrix_shape(one))
    torch.testing.assert_close(projection.project(one, found), (outputs @ gradients @ inputs.T).flatten(1))


def test_entries() -> None:
    one = component("layer", (3000, 2000))
    projection = LoGra((4, 9), memory_budget=0).start([one])
    for side, size in (("outputs", 4), ("inputs", 9)):
        matrix = projection.matrix(one, side)
        assert abs(matrix.mean()) < 0.02
        assert abs(matrix.std() * size**0.5 - 1) < 0.02
        assert torch.equal(matrix, projection.matrix(one, side))
    assert not torch.allclose(projection.matrix(one, "outputs")[0, :9], projection.matrix(one, "inputs")[:, 0])


def test_a_pair_is_for_every_component() -> None:
    components = [component("wide", (3, 50)), component("tall", (50, 20)), component("vector", (7,))]
    projection = LoGra([4, 10]).start(components)
    assert projection.sides == {"wide": (3, 10), "tall": (4, 10), "vector": (1, 7)}
    assert projection.sizes == {"wide": 30, "tall": 40, "vector": 7}
    assert torch.equal(projection.matrix(components[0], "outputs"), torch.eye(3))
    assert torch.equal(projection.matrix(components[2], "inputs"), torch.eye(7))


@given(size=st.integers(1, 5000), rows=st.integers(1, 3000), columns=st.integers(1, 3000))
def test_split(size: int, rows: int, columns: int) -> None:
    size = min(size, rows * columns)
    k_out, k_in = split(size, rows, columns)
    assert 1 <= k_out <= rows
    assert 1 <= k_in <= columns
    assert k_out * k_in <= size
    full = k_out == rows or k_in == columns
    assert full or (abs(k_out - k_in) <= 2 and (min(k_out, k_in) + 1) ** 2 > size)
    assert (k_out >= k_in) == (rows > columns) or k_out == k_in or full


@pytest.mark.parametrize("pair", [(4,), (1, 2, 3), (0, 4), (2, 2.5), (True, 4), ("a", 2)])
def test_pairs_out_of_range(pair: Any) -> None:
    with pytest.raises(ValueError, match=r"`LoGra\(dimensions=\(.*\)\)`: expected a pair \(k_out, k_in\) of ints >= 1"):
        LoGra(pair)


@pytest.mark.parametrize("case", SHAPES)
def test_given_matrices_take_the_place_of_random_ones(case: str) -> None:
    shape, kind = SHAPES[case]
    one, found = component("layer", shape), record(shape, kind)
    projection = LoGra((2, 3)).start([one])
    rows, columns = matrix_shape(one)
    k_out, k_in = projection.sides["layer"]
    if k_in == columns:
        return
    matrix = torch.randn(k_in, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    projection.give(one, "inputs", matrix)
    assert torch.equal(projection.matrix(one, "inputs"), matrix)
    gradients = found.example_gradients().reshape(len(found), rows, columns)
    outputs = projection.matrix(one, "outputs").double()
    torch.testing.assert_close(projection.project(one, found), (outputs @ gradients @ matrix.T).flatten(1))
    with pytest.raises(ValueError, match=r"`LoGra.give\('layer', 'outputs'\)`: expected a matrix \["):
        projection.give(one, "outputs", torch.ones(k_out + 1, rows))
    assert projection.start([one]).given == {}
