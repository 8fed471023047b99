from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from lightning_influence.estimators import factors
from lightning_influence.estimators.factors import Factors, check_finite, check_ids, few, low_rank_root


def drawn(n: int = 30, r: int = 4, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(r, r, generator=generator)
    features = torch.randn(n, r, generator=generator)
    return Factors.checked("f", torch.randn(n, generator=generator), features, half + half.T)


@pytest.mark.parametrize("block", [1, 4 * 7, 2**18])
def test_products_equal_dense_ones(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(factors, "_BLOCK_ON_CPU", block)
    pool = drawn()
    dense = pool.features.double()
    direction = torch.arange(4.0).double()
    torch.testing.assert_close(pool.products(direction), dense @ direction)
    torch.testing.assert_close(pool.self_interactions(), (dense @ pool.metric @ dense.T).diagonal())
    torch.testing.assert_close(pool.norms(), dense.norm(dim=1))
    torch.testing.assert_close(pool.lift(direction), pool.metric @ direction)
    torch.testing.assert_close(pool.shift([3, 17, 4]), dense[3] + dense[17] + dense[4])
    assert torch.equal(pool.shift([]), torch.zeros(4).double())


@pytest.mark.parametrize("block", [1, 4 * 7, 2**18])
def test_parts_in_order(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(factors, "_BLOCK_ON_CPU", block)
    pool = drawn()
    dense = pool.features.double()
    interactions = dense @ pool.metric @ dense.T
    rows = list(range(29, -1, -1))
    first_order, interaction = pool.in_order(rows)
    assert torch.equal(first_order, -pool.values[rows])
    expected = [float(interactions[rows[:k], j].sum() + interactions[j, j] / 2) for k, j in enumerate(rows)]
    torch.testing.assert_close(interaction, torch.tensor(expected, dtype=torch.float64))
    assert [len(part) for part in pool.in_order([])] == [0, 0]


@pytest.mark.parametrize(
    "metric",
    [
        torch.tensor([1.0, -1.0, 0.0, 2.5]).diag(),
        torch.eye(4).roll(2, 0),
        torch.eye(4).flip(0) * torch.tensor([2.0, -3.0, -3.0, 2.0]),
        torch.zeros(4, 4),
    ],
)
def test_a_metric_that_moves_columns_is_never_multiplied(metric: torch.Tensor) -> None:
    pool = Factors.checked("f", torch.zeros(30), drawn().features, metric)
    assert pool._moves is not None
    for shifts in (torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.arange(4.0).double()):
        torch.testing.assert_close(pool.lift(shifts), shifts.double() @ metric.double(), rtol=0, atol=0)
    assert drawn()._moves is None


@pytest.mark.parametrize("block", [1, 6 * 4, 2**18])
@pytest.mark.parametrize("given", [True, False])
def test_diagonal_features_are_never_multiplied(monkeypatch: pytest.MonkeyPatch, block: int, given: bool) -> None:
    """What comes from d alone is what the products give; a zero on the diagonal is one of the numbers."""
    monkeypatch.setattr(factors, "_BLOCK_ON_CPU", block)
    half = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    features = torch.tensor([2.0, -1.0, 0.0, 0.5, 3.0, 1.0]).diag()
    pool = Factors.checked("f", torch.arange(6.0), features, half + half.T if given else None)
    metric = half + half.T if given else torch.eye(6).double()
    dense, direction = features.double(), torch.arange(6.0).double()
    pairs = dense @ metric @ dense
    assert torch.equal(pool.scales, features.diagonal().double())
    torch.testing.assert_close(pool.products(direction), dense @ direction)
    torch.testing.assert_close(pool.self_interactions(), pairs.diagonal())
    torch.testing.assert_close(pool.norms(), dense.norm(dim=1))
    torch.testing.assert_close(pool.lifted([4, 0]), (dense @ metric)[[4, 0]])
    expected = [pairs[[5, 1, 4, 0][:k], j].sum() + pairs[j, j] / 2 for k, j in enumerate([5, 1, 4, 0])]
    torch.testing.assert_close(pool.in_order([5, 1, 4, 0])[1], torch.stack(expected))


@pytest.mark.parametrize("features", [torch.eye(4)[:3], torch.eye(4).flip(0), torch.eye(4) + torch.eye(4).roll(1, 0)])
def test_features_that_are_not_diagonal(features: torch.Tensor) -> None:
    pool = Factors.checked("f", torch.zeros(len(features)), features, torch.arange(4.0).diag())
    assert pool.scales is None
    assert torch.equal(pool.lifted([2, 0]), (features @ torch.arange(4.0).diag())[[2, 0]].double())


def test_a_metric_is_taken_as_it_is_or_its_rounding_averaged() -> None:
    half = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    exact = (half + half.T).double()
    assert torch.equal(Factors.checked("f", torch.zeros(3), torch.ones(3, 5), exact).metric, exact)
    rounded = exact.clone()
    rounded[0, 1] += 1e-12
    found = Factors.checked("f", torch.zeros(3), torch.ones(3, 5), rounded).metric
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_one_block_for_many_passes_changes_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(factors, "_BLOCK_ON_CPU", 4 * 7)
    pool = drawn()
    pool = Factors.checked("f", pool.values, pool.features.to(dtype), pool.metric)
    shared, direction = pool.with_scratch(), torch.arange(4.0).double()
    before = pool.features.clone()
    for _ in range(2):
        assert torch.equal(shared.products(direction), pool.products(direction))
        assert torch.equal(shared.norms(), pool.norms())
        assert torch.equal(shared.in_order([3, 9, 1])[1], pool.in_order([3, 9, 1])[1])
    assert torch.equal(pool.features, before)
    assert shared.scratch.shape == (7, 4)


def test_without_features() -> None:
    pool = Factors.checked("f", torch.ones(3))
    assert pool.shift([0, 1]).shape == (0,)
    assert pool.in_order([2, 0])[1].tolist() == [0.0, 0.0]


def test_sums_of_many_small_features_keep_their_digits() -> None:
    """In float32 the sum of 10⁵ such rows is off in the fourth digit when taken one by one."""
    features = torch.full((100_000, 2), 0.1)
    pool = Factors.checked("f", torch.zeros(100_000), features)
    exact = float(torch.tensor(0.1).double()) * 100_000
    torch.testing.assert_close(pool.shift(range(100_000)), torch.full((2,), exact, dtype=torch.float64))


def test_places_of_ids() -> None:
    assert Factors.checked("f", torch.zeros(3), ids=[30, 4, 100]).id_ranks.tolist() == [1, 0, 2]
    assert Factors.checked("f", torch.zeros(3), ids=["30", "4", "100"]).id_ranks.tolist() == [1, 2, 0]
    assert Factors.checked("f", torch.zeros(3), ids=[30, 4, 100]).rows == {30: 0, 4: 1, 100: 2}


@pytest.mark.parametrize(
    "ids",
    [[2, 0, 1], (2, 0, 1), torch.tensor([2, 0, 1]), np.array([2, 0, 1]), [np.int64(2), np.int32(0), 1], {2, 0, 1}],
)
def test_ids_become_plain(ids: object) -> None:
    names = check_ids("f", ids, 3)
    assert sorted(names) == [0, 1, 2]
    assert {type(name) for name in names} == {int}


def test_names_become_plain() -> None:
    names = check_ids("f", np.array(["b", "a"]), 2)
    assert names == ("b", "a")
    assert type(check_ids("f", [np.str_("b")], 1)[0]) is str
    assert check_ids("f", None, 2) == (0, 1)


def test_ids_of_another_kind() -> None:
    with pytest.raises(ValueError, match=re.escape("`f(ids)`: expected ids that are all int or all str. Got float.")):
        check_ids("f", [0.0, 1.0], 2)


def test_few() -> None:
    assert few(["x"]) == "id 'x'"
    assert few([1, 2]) == "ids 1, 2"
    assert few(range(7)) == "ids 0, 1, 2, 3, 4, ... (2 more)"


def test_finite_or_named() -> None:
    check_finite("f", "x", torch.ones(3, dtype=torch.bool), range(3))
    message = (
        "`f(x)`: expected finite numbers. 6 of 7 things have NaN or infinite x: ids 1, 2, 3, 4, 5, ... (1 more). "
        "Look at their loss, or leave them out."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_finite("f", "x", torch.arange(7) == 0, range(7), "things")


@pytest.mark.parametrize(("rank", "scale"), [(0, 1.0), (1, 1.0), (5, 1e-9), (5, 1e9)])
def test_a_root_of_few_rows(rank: int, scale: float) -> None:
    half = scale * torch.randn(rank, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = half.T @ half
    root = low_rank_root(matrix, 5)
    assert root is not None
    assert root.shape == (rank, 40)
    torch.testing.assert_close(root.T @ root, matrix, rtol=1e-12, atol=1e-13 * float(matrix.abs().max()))


@pytest.mark.parametrize(
    "matrix",
    [
        torch.eye(40).double(),  # of more rows
        torch.eye(40).double().flip(0),  # whose diagonal tells nothing
        -torch.ones(40, 40).double(),
        torch.diag(torch.tensor([1.0, -1e-6] + [0.0] * 38)).double(),
    ],
)
def test_no_root_of_few_rows(matrix: torch.Tensor) -> None:
    assert low_rank_root(matrix, 5) is None


@pytest.mark.parametrize("rank", [3, 40])
def test_a_metric_of_few_targets_is_applied_by_its_root(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(rank, 40, generator=generator, dtype=torch.float64)
    pool = Factors.checked("f", torch.zeros(6), torch.randn(6, 40, generator=generator), half.T @ half)
    rows = torch.randn(2, 3, 40, generator=generator)
    torch.testing.assert_close(pool.lift(rows), rows.double() @ half.T @ half)
    torch.testing.assert_close(pool.lift(rows[0, 0]), rows[0, 0].double() @ half.T @ half)
    assert (pool._root is None) == (rank == 40)
