from __future__ import annotations

from math import gcd
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.capture.record import DenseRecord, FactoredRecord, IndexedRecord, SumRecord
from lightning_influence.projections import FactoredProjection, LoGra
from lightning_influence.projections import factored as module
from tests.projections.cases import SHAPES, component, dense, flat, normal, record


def project(projection: FactoredProjection, shape: tuple[int, ...], found: Any) -> torch.Tensor:
    one = component("layer", shape)
    return projection.start([one]).project(one, found)


def unit_gradients(shape: tuple[int, ...]) -> DenseRecord:
    """One example for each weight."""
    numel = torch.Size(shape).numel()
    return DenseRecord(torch.arange(numel), torch.eye(numel).reshape(numel, *shape))


@given(
    o=st.integers(1, 12),
    i=st.integers(1, 12),
    part=st.floats(0, 1),
    oversampling=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_every_weight_goes_to_one_bucket_with_a_sign(o: int, i: int, part: float, oversampling: int, seed: int) -> None:
    """So no inner product is biased, and no length: the diagonal of R^T R is 1 exactly, whatever the shape."""
    size = max(1, int(part * o * i))
    matrix = project(FactoredProjection(size, oversampling=oversampling, seed=seed), (o, i), unit_gradients((o, i))).T
    assert matrix.shape == (size, o * i)
    assert torch.equal(matrix.abs().sum(0), torch.ones(o * i))
    assert torch.equal(matrix.abs(), matrix.square())


@pytest.mark.parametrize("case", SHAPES)
def test_as_many_dimensions_as_weights_lose_nothing(case: str) -> None:
    shape, kind = SHAPES[case]
    found = record(shape, kind, n=5)
    projected = project(FactoredProjection(1.0), shape, found)
    torch.testing.assert_close(projected @ projected.T, flat(found) @ flat(found).T)


@pytest.mark.parametrize("case", ["alike of rank one", "rank three", "one weight", "repeating", "table"])
@pytest.mark.parametrize("size", [7, 16])
def test_the_error_is_that_of_a_dense_projection(case: str, size: int) -> None:
    """Mean squared error over draws against (|g|^2 |g'|^2 + <g, g'>^2) / k, with 2 / m more allowed for the folds."""
    shape = (96, 150)
    found = gradients(case, shape)
    exact = flat(found) @ flat(found).T
    squares = torch.stack(
        [
            (p @ p.T - exact).square()
            for p in (project(FactoredProjection(size, seed=k), shape, found) for k in range(800))
        ]
    )
    lengths = exact.diagonal()
    bound = (lengths[:, None] * lengths + exact.square()) / size
    allowed = 1 + 2 * 2 / 8 + 4 * (squares.std(0) / bound / 800**0.5)
    assert (squares.mean(0) / bound < allowed).all()


def gradients(case: str, shape: tuple[int, int]) -> FactoredRecord | IndexedRecord:
    o, i = shape
    n, t = 3, 1 if case == "alike of rank one" else 3
    inputs = normal(1, t, i) + 0.3 * normal(n, t, i, seed=1)
    outputs = normal(1, t, o, seed=2) + 0.3 * normal(n, t, o, seed=3)
    if case == "one weight":  # an input that dwarfs all others, as language models have them
        inputs[..., 5], outputs[..., 7] = 100.0, 100.0
    if case == "repeating":  # the same in every head
        inputs, outputs = inputs[..., :10].repeat(1, 1, 15), outputs[..., :16].repeat(1, 1, 6)
    if case == "table":
        return IndexedRecord(torch.arange(n), torch.tensor([[1, 2, 3]] * n), inputs, o)
    return FactoredRecord(torch.arange(n), inputs, outputs)


def test_far_more_precise_than_two_factors_of_equal_size() -> None:
    shape = (96, 150)
    found = gradients("alike of rank one", shape)
    exact = flat(found) @ flat(found).T

    def error(cls: Any) -> float:
        rows = [project(cls(49, seed=k), shape, found) for k in range(300)]
        return float(torch.stack([(p @ p.T - exact).square() for p in rows]).mean())

    assert error(FactoredProjection) < 0.2 * error(LoGra)


def test_the_gradient_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {case: record(*SHAPES[case]) for case in ("tall", "wide", "table", "tied")}
    expected = {case: project(FactoredProjection(4), SHAPES[case][0], dense(found)) for case, found in cases.items()}
    for cls in (FactoredRecord, IndexedRecord, SumRecord):
        monkeypatch.setattr(cls, "example_gradients", lambda self: pytest.fail("materialised"))
    for case, found in cases.items():
        torch.testing.assert_close(project(FactoredProjection(4), SHAPES[case][0], found), expected[case])


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("block", [1, 37, 100])
def test_signs_are_drawn_a_few_at_a_time(case: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def counted(size: int, rng: torch.Generator) -> torch.Tensor:
        drawn.append(size)
        return original(size, rng)

    original = module.random_signs
    monkeypatch.setattr(module, "random_signs", counted)
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "PIECE", 2)
    shape, kind = SHAPES[case]
    found = record(shape, kind)
    projection = FactoredProjection(4, oversampling=3)
    result = project(projection, shape, found)
    torch.testing.assert_close(result, project(projection, shape, dense(found)))
    height, width = projection.buckets(component("layer", shape))
    assert max(drawn) <= max(block, width)
    assert sum(drawn) == 2 * height * width  # kept from piece to piece, drawn again after start
    matrix = project(projection, shape, unit_gradients(shape))
    assert torch.equal(matrix.abs().sum(1), torch.ones(len(matrix)))


@pytest.mark.parametrize("case", SHAPES)
def test_what_does_not_fit_is_drawn_again(case: str) -> None:
    shape, kind = SHAPES[case]
    found, one = record(shape, kind), component("layer", shape)
    generous = FactoredProjection(4).start([one])
    expected = generous.project(one, found)
    assert generous._kept_bytes > 0
    for budget in (0, generous._kept_bytes - 1):
        tight = FactoredProjection(4, memory_budget=budget).start([one])
        for _ in range(2):
            assert torch.equal(tight.project(one, found), expected)
        assert tight._kept_bytes <= budget
    assert torch.equal(generous.project(one, found), expected)


@given(o=st.integers(1, 400), i=st.integers(1, 400), size=st.integers(1, 60), oversampling=st.integers(1, 8))
def test_buckets(o: int, i: int, size: int, oversampling: int) -> None:
    one = component("layer", (o, i))
    size = min(size, o * i)
    height, width = FactoredProjection(size, oversampling=oversampling).start([one]).buckets(one)
    if size == o * i:
        assert (height, width) == (o, i)
        return
    assert height == min(o, oversampling * size)
    assert width >= min(i, oversampling * size)
    assert gcd(width, size) == 1
    assert width <= min(i, oversampling * size) + size


@pytest.mark.parametrize("oversampling", [0, -1, 1.5, True, None])
def test_oversampling(oversampling: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"`FactoredProjection\(oversampling={oversampling!r}\)`: expected an int >= 1"
    ):
        FactoredProjection(8, oversampling=oversampling)
