"""The laws of the family, for every member."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.capture.record import DenseRecord, FactoredRecord, LayerRecord, SumRecord
from lightning_influence.errors import NotFittedError
from lightning_influence.projections import PROJECTIONS, FactoredProjection, LoGra, Projection, TrakProjection
from lightning_influence.projections.base import allocate, matrix_shape, pieces, stable_seed
from tests.projections.cases import SHAPES, component, dense, flat, normal, record

Build = Callable[..., Projection]
MEMBERS: dict[str, Build] = {
    "FactoredProjection": FactoredProjection,
    "FactoredProjection without oversampling": lambda k, **options: FactoredProjection(k, oversampling=1, **options),
    "LoGra": LoGra,
    "TrakProjection": TrakProjection,
    "TrakProjection of signs": lambda k, **options: TrakProjection(k, kind="rademacher", **options),
}
SEEDS = 600
COMPONENTS = [component(name, shape) for name, (shape, _) in SHAPES.items()]


def close(name: str) -> dict[str, float]:
    """Tolerances: traker computes in float32."""
    return {"rtol": 1e-4, "atol": 1e-4} if name.startswith("Trak") else {"rtol": 1e-10, "atol": 1e-10}


def project(projection: Projection, shape: tuple[int, ...], found: Any, name: str = "layer") -> torch.Tensor:
    one = component(name, shape)
    return projection.start([one]).project(one, found).double()


def test_the_list_holds_every_member() -> None:
    found, classes = set(), [Projection]
    while classes:
        children = [child for parent in classes for child in parent.__subclasses__()]
        found |= set(children)
        classes = children
    assert found == set(PROJECTIONS.values())
    assert {type(build(4)).__name__ for build in MEMBERS.values()} == set(PROJECTIONS)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("case", SHAPES)
def test_inner_products_are_right_on_average(name: str, case: str) -> None:
    """Lengths too: a component that comes out longer or shorter than it is would be re-weighted silently."""
    shape, kind = SHAPES[case]
    found = record(shape, kind)
    exact = flat(found) @ flat(found).T
    estimates = torch.stack(
        [p @ p.T for p in (project(MEMBERS[name](6, seed=seed), shape, found) for seed in range(SEEDS))]
    )
    error = estimates.std(0) / SEEDS**0.5
    assert ((estimates.mean(0) - exact).abs() < 4.5 * error + 1e-4 * exact.abs()).all()
    assert (error < 0.1 * exact.diagonal().max()).all()  # tight enough to notice a factor


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("case", SHAPES)
def test_linear_in_the_gradient(name: str, case: str) -> None:
    shape, kind = SHAPES[case]
    one, other = record(shape, kind), record(shape, kind, seed=20)
    projection = MEMBERS[name](6)
    left, right = project(projection, shape, one), project(projection, shape, other)
    both = project(projection, shape, SumRecord(one.ids, (one, other)))
    torch.testing.assert_close(both, left + right, **close(name))
    values = 3 * one.example_gradients() - 0.5 * other.example_gradients()
    torch.testing.assert_close(
        project(projection, shape, DenseRecord(one.ids, values)), 3 * left - 0.5 * right, **close(name)
    )


@pytest.mark.parametrize("name", MEMBERS)
@given(
    kind=st.sampled_from(["factored", "indexed", "tied"]),
    o=st.integers(1, 30),
    i=st.integers(1, 30),
    t=st.integers(1, 8),
    share=st.floats(0.01, 1.0),
)
def test_every_form_of_a_gradient_gives_the_same(name: str, kind: str, o: int, i: int, t: int, share: float) -> None:
    o = max(o, 2)  # row 1 of a table is looked up
    found = record((o, i), kind, n=4, t=t)
    projection = MEMBERS[name](share)
    expected = project(projection, (o, i), dense(found))
    assert expected.shape == (4, projection.total)
    torch.testing.assert_close(project(projection, (o, i), found), expected, **close(name))


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("case", SHAPES)
def test_batches_do_not_matter(name: str, case: str) -> None:
    shape, kind = SHAPES[case]
    found = record(shape, kind, n=7)
    projection = MEMBERS[name](6)
    whole = project(projection, shape, found)
    for cuts in ([0, 1, 7], [0, 3, 4, 7]):
        parts = [found.narrow(a, b) for a, b in pairwise(cuts)][::-1]
        rows = torch.cat([project(projection, shape, part) for part in parts][::-1])
        torch.testing.assert_close(rows, whole, **close(name))


@pytest.mark.parametrize("name", MEMBERS)
def test_the_seed_and_the_name_decide(name: str) -> None:
    shape, kind = SHAPES["square"]
    found = record(shape, kind)
    torch.manual_seed(1)
    one = project(MEMBERS[name](6, seed=3), shape, found)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(one, project(MEMBERS[name](6, seed=3), shape, found))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.allclose(one, project(MEMBERS[name](6, seed=4), shape, found))
    assert not torch.allclose(one, project(MEMBERS[name](6, seed=3), shape, found, name="other"))


def test_seeds_are_the_same_in_every_process() -> None:
    assert stable_seed(3, "a.b", "inputs", 1) == 504728907086914677
    assert len({stable_seed(k, n) for k in range(9) for n in ("a", "b", "ab")}) == 27


@pytest.mark.parametrize("name", MEMBERS)
def test_other_components_change_nothing_but_the_size(name: str) -> None:
    first, second = component("first", (6, 5)), component("second", (6, 5))
    found = record((6, 5), "factored")
    both = MEMBERS[name](12).start([first, second])
    assert both.sizes == {"first": 6, "second": 6}
    alone = MEMBERS[name](6).start([second])
    torch.testing.assert_close(both.project(second, found), alone.project(second, found))
    assert not torch.allclose(both.project(first, found), both.project(second, found))


@pytest.mark.parametrize("name", MEMBERS)
def test_settings_are_everything(name: str) -> None:
    projection = MEMBERS[name](0.3, seed=5, memory_budget=10**6)
    twin = type(projection)(**projection.settings())
    assert repr(twin) == repr(projection)
    assert repr(twin).startswith(f"{type(projection).__name__}(dimensions=0.3, seed=5, memory_budget=1000000")
    for case in ("tied", "convolution"):
        shape, kind = SHAPES[case]
        found = record(shape, kind)
        assert torch.equal(project(projection, shape, found), project(twin, shape, found))


@pytest.mark.parametrize("name", MEMBERS)
def test_dimensions_are_shared_out(name: str) -> None:
    projection = MEMBERS[name](100).start(COMPONENTS)
    assert list(projection.sizes) == list(SHAPES)
    rows = [projection.project(c, record(*SHAPES[c.name])) for c in COMPONENTS]
    assert [row.shape for row in rows] == [(3, projection.sizes[c.name]) for c in COMPONENTS]
    together = torch.cat(rows, dim=1)
    assert together.shape[1] == projection.total <= 100
    assert projection.total == 100 or isinstance(projection, LoGra)  # which needs products
    for row, part in zip(rows, projection.slices.values(), strict=True):
        assert torch.equal(together[:, part], row)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_does_not_reach_it(name: str, dtype: torch.dtype) -> None:
    shape, kind = SHAPES["square"]
    found = record(shape, kind)
    found = FactoredRecord(found.ids, found.inputs.to(dtype), found.gradients.to(dtype))
    one = component("layer", shape)
    projection = MEMBERS[name](20).start([one])
    expected = projection.project(one, found)
    assert expected.dtype == (torch.float32 if name.startswith("Trak") else dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(projection.project(one, found), expected)


@pytest.mark.parametrize("name", MEMBERS)
def test_records_are_left_alone(name: str) -> None:
    for shape, kind in SHAPES.values():
        found = record(shape, kind)
        before = flat(found).clone()
        project(MEMBERS[name](6), shape, found)
        project(MEMBERS[name](1.0), shape, found)
        assert torch.equal(flat(found), before)


# Arguments


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("dimensions", [0, -3, 0.0, 1.5, 8192.0, True, "8192", None, float("nan")])
def test_dimensions_out_of_range(name: str, dimensions: Any) -> None:
    text = rf"`{name}\(dimensions={dimensions!r}\)`: expected an int >= 1 .* or a float in \(0, 1\] \(a share"
    with pytest.raises(ValueError, match=text):
        PROJECTIONS[name](dimensions)


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 0.5}, r"seed=0.5\)`: expected an int"),
        ({"seed": True}, r"seed=True\)`: expected an int"),
        ({"memory_budget": -1}, r"memory_budget=-1\)`: expected a number of bytes, an int >= 0"),
        ({"memory_budget": "1 GB"}, r"memory_budget='1 GB'\)`: expected a number of bytes"),
    ],
)
def test_arguments(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}\({message}"):
        PROJECTIONS[name](8, **options)


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("dimensions", [8, 1000])
def test_dimensions_that_do_not_suit_the_components(name: str, dimensions: int) -> None:
    text = "at least one dimension for each of the 9 components and at most one for each of their 910 parameters"
    with pytest.raises(ValueError, match=rf"`{name}\(dimensions={dimensions}\)`: expected {text}"):
        PROJECTIONS[name](dimensions).start(COMPONENTS)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_components_are_needed_first(name: str) -> None:
    with pytest.raises(NotFittedError, match=rf"{name} has not been started: call start\(components\)"):
        PROJECTIONS[name](8).project(component("up", (3, 4)), record((3, 4), "factored"))
    with pytest.raises(ValueError, match="each of the 0 components"):
        PROJECTIONS[name](8).start([])


@pytest.mark.parametrize("name", PROJECTIONS)
def test_unknown_components_are_named(name: str) -> None:
    projection = PROJECTIONS[name](8).start([component("layers.0.up", (3, 4))])
    with pytest.raises(ValueError, match=r"'layers.1.up' is not among the 1 components .* nearest .*'layers.0.up'"):
        projection.project(component("layers.1.up", (3, 4)), record((3, 4), "factored"))
    with pytest.raises(ValueError, match=r"'layers.0.up' of shape \(4, 3\) is not as in the 1 components"):
        projection.project(component("layers.0.up", (4, 3)), record((4, 3), "factored"))


# Sharing out


@given(sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=30), part=st.floats(0, 1))
def test_allocation(sizes: list[int], part: float) -> None:
    total = min(sum(sizes), len(sizes) + int(part * (sum(sizes) - len(sizes))))
    found = allocate(total, sizes)
    assert sum(found) == total
    assert all(1 <= k <= size for k, size in zip(found, sizes, strict=True))
    shares = [(size, k) for size, k in zip(sizes, found, strict=True) if k > 1]
    ratio = sum(k for _, k in shares) / max(1, sum(size for size, _ in shares))
    assert all(abs(k - ratio * size) <= 1 + 1e-6 * k + len(sizes) * ratio for size, k in shares)


@pytest.mark.parametrize(
    ("total", "sizes", "expected"),
    [
        (3, [5, 5, 5], [1, 1, 1]),
        (10, [1, 1, 10**6], [1, 1, 8]),
        (5, [1, 1, 1, 7], [1, 1, 1, 2]),
        (7, [10, 10, 10], [3, 2, 2]),
        (13, [6, 3, 4], [6, 3, 4]),
        (6, [100, 34, 33, 33], [3, 1, 1, 1]),
    ],
)
def test_allocation_by_hand(total: int, sizes: list[int], expected: list[int]) -> None:
    assert allocate(total, sizes) == expected


def test_shares_are_of_the_parameters() -> None:
    components = [component(str(k), (size, 10)) for k, size in enumerate((100, 60, 40))]
    assert FactoredProjection(0.05).start(components).sizes == {"0": 50, "1": 30, "2": 20}
    assert FactoredProjection(1e-9).start(components).sizes == {"0": 1, "1": 1, "2": 1}
    assert FactoredProjection(1.0).start(components).total == 2000


def test_matrix_shape() -> None:
    shapes = {(): (1, 1), (7,): (1, 7), (3, 4): (3, 4), (3, 4, 5): (3, 20)}
    assert {shape: matrix_shape(component("x", shape)) for shape in shapes} == shapes


@pytest.mark.parametrize("case", SHAPES)
def test_the_device_is_that_of_the_gradients(case: str) -> None:
    """Ids stay on the CPU."""
    found = record(*SHAPES[case])
    assert found.device == torch.device("cpu")
    assert moved(found).device == torch.device("meta")


def moved(found: LayerRecord) -> LayerRecord:
    if isinstance(found, SumRecord):
        return SumRecord(found.ids, tuple(moved(part) for part in found.parts))
    tensors = {key: value.to("meta") for key, value in vars(found).items() if isinstance(value, torch.Tensor)}
    return replace(found, **{**tensors, "ids": found.ids})


def test_pieces() -> None:
    found = DenseRecord(torch.arange(5), normal(5, 2))
    assert [len(part) for part in pieces(found, 10, 20)] == [2, 2, 1]
    assert [len(part) for part in pieces(found, 10, 1)] == [1] * 5
    assert torch.equal(torch.cat([part.ids for part in pieces(found, 0, 3)]), found.ids)
