from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_influence import EKFAC, Estimator, FactoredProjection, GradientDot, InfluenceFunction, ProjectedDot
from lightning_influence.capture.record import DenseRecord, FactoredRecord
from lightning_influence.estimators import CKA
from lightning_influence.estimators.low_rank import LowRank, contract, gathered, rank_note, thin_is_cheaper, truncated
from tests.curvature.models import Images, Mixed, Tokens, images, mlp, normal, points, ready, texts, token_rows


def influence(model: nn.Module, data: Any, **options: Any) -> Estimator:
    return InfluenceFunction(model, EKFAC(fisher="empirical"), **options).fit(data)


CASES: dict[str, Any] = {
    "padded text": (lambda: ready(Tokens()), texts),
    "every kind of layer": (lambda: ready(Mixed()), token_rows),
    "images": (lambda: ready(Images()), images),
    "points": (mlp, points),
}


def wide_mlp() -> nn.Module:
    return mlp(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))


def dense(found: Tensor | LowRank) -> Tensor:
    return found.dense() if isinstance(found, LowRank) else found


def best(matrix: Tensor, rank: int) -> Tensor:
    """Eckart and Young, from the eigenvectors of the Gram matrix."""
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    kept = vectors[:, vectors.shape[1] - rank :] if rank < vectors.shape[1] else vectors
    return matrix @ kept @ kept.T


@pytest.mark.parametrize("shape", [(3, 9, 7), (2, 4, 12), (1, 5, 1)])
@pytest.mark.parametrize("rank", [1, 2, 5, 99])
def test_the_closest_matrices_of_a_rank(shape: tuple[int, ...], rank: int) -> None:
    matrices = normal(*shape)
    found = truncated(matrices, rank)
    torch.testing.assert_close(dense(found), torch.stack([best(m, rank) for m in matrices]))
    _, o, i = shape
    assert isinstance(found, LowRank) == (min(rank, o, i) * (o + i) < o * i)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999, 1.0])
def test_the_least_rank_with_a_share_of_the_energy(share: float) -> None:
    """Each query its own, whatever stands beside it."""
    matrices = normal(4, 8, 6) * torch.tensor([3.0, 1.0, 0.2, 0.1, 0.05, 0.01]).double()
    matrices[1] = normal(8, 1) @ normal(1, 6)
    matrices[2] = 0
    found = dense(truncated(matrices, share))
    for matrix, one in zip(matrices, found, strict=True):
        energy = float(matrix.square().sum())
        errors = [float((matrix - best(matrix, r)).square().sum()) for r in range(7)]
        rank = next(r for r in range(1, 7) if errors[r] <= (1 - share) * energy + 1e-12 * energy)
        torch.testing.assert_close(one, best(matrix, rank), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(dense(truncated(matrix[None], share))[0], one)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [1000, 1.0])
@pytest.mark.parametrize("normalise", [False, True])
def test_full_rank_changes_nothing(case: str, rank: int | float, normalise: bool) -> None:
    model, rows = CASES[case][0](), CASES[case][1]
    train, queries = rows(7), rows(3, seed=3)
    estimator = influence(model, train, normalise=normalise)
    expected = estimator.score(queries, train, per_component=True)
    found = estimator.score(queries, train, per_component=True, rank=rank)
    torch.testing.assert_close(found.values, expected.values)
    assert found.formula == f"{expected.formula}, {rank_note(rank)}"


@pytest.mark.parametrize("make", [influence, lambda model, data: GradientDot(model)])
@pytest.mark.parametrize("rank", [1, 2, 0.5, 0.99])
def test_the_error_is_bounded_by_what_is_left_out(make: Any, rank: int | float) -> None:
    """|score - found| <= |V - V_r| |g_i| for each component, and far from nothing is left out at rank 1."""
    train, queries = texts(8), texts(3, seed=3)
    estimator = make(ready(Tokens()), train)
    exact = estimator.score(queries, train, per_component=True).values
    found = estimator.score(queries, train, per_component=True, rank=rank).values
    [block] = estimator._prepared(estimator._loader(queries), None, "data", 0)
    squares = GradientDot(estimator.model).self_influence(train, per_component=True).values[:, 0]
    for k, component in enumerate(estimator.components):
        v = block[component.name]
        left_out = (v - dense(truncated(v, rank))).flatten(1).norm(dim=1)
        assert ((exact[k] - found[k]).abs() <= left_out[:, None] * squares[k].sqrt() + 1e-9).all()
        assert torch.equal(exact[k], found[k]) == (component.kind == "embedding" or not left_out.any())
    if isinstance(rank, float):
        share = torch.stack([dense(truncated(block[n], rank)).square().sum((1, 2)) for n in ("up", "head")])
        whole = torch.stack([block[n].square().sum((1, 2)) for n in ("up", "head")])
        assert (share >= rank * whole - 1e-12).all()


@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 2, st.integers(1, 9), st.integers(1, 9)),
    q=st.integers(1, 4),
    rank=st.integers(1, 3),
)
def test_contraction_is_that_of_the_matrices(sizes: tuple[int, int, int, int], q: int, rank: int) -> None:
    n, t, i, o = sizes
    record = FactoredRecord(torch.arange(n), normal(n, t, i), normal(n, t, o, seed=1))
    operand = LowRank(normal(q, o, rank, seed=2), normal(q, rank, i, seed=3))
    expected = torch.einsum("qor,qri,nto,nti->qn", operand.left, operand.right, record.gradients, record.inputs)
    for found in (operand, replace(operand, keeps=True)):
        torch.testing.assert_close(contract(record, found), expected)
        torch.testing.assert_close(contract(DenseRecord(record.ids, record.example_gradients()), found), expected)


@pytest.mark.parametrize("chunk", [1, 100])
@pytest.mark.parametrize("t", [1, 40])
def test_a_part_at_a_time(chunk: int, t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    record = FactoredRecord(torch.arange(3), normal(3, t, 4), normal(3, t, 6, seed=1))
    operand = LowRank(normal(7, 6, 2, seed=2), normal(7, 2, 4, seed=3))
    expected = record.contract(operand.dense())
    monkeypatch.setattr("lightning_influence.estimators.low_rank.CHUNK", chunk)
    assert thin_is_cheaper(record, operand) == (t == 1)
    torch.testing.assert_close(contract(record, operand), expected)


def test_the_cheaper_way_is_taken() -> None:
    def cheap(n: int, t: int, size: int, q: int, r: int, keeps: bool = False) -> bool:
        record = FactoredRecord(torch.arange(n), torch.empty(n, t, size), torch.empty(n, t, size))
        return thin_is_cheaper(record, LowRank(torch.empty(q, size, r), torch.empty(q, r, size), keeps))

    assert cheap(8, 64, 256, 10, 2)
    assert cheap(1, 128, 512, 10, 40)
    assert not cheap(1, 128, 512, 10, 40, keeps=True)
    assert not cheap(8, 64, 16, 10, 8)
    assert cheap(1, 1, 256, 1, 8)


@pytest.mark.parametrize("rank", [1, 0.8])
def test_more_queries_fit_and_give_the_same(rank: int | float) -> None:
    train, queries, passes = points(9), points(8, seed=3), []
    estimator = GradientDot(wide_mlp())
    expected = estimator.score(queries, train, rank=rank)
    estimator.memory_budget = 8 * 563  # bytes of one query
    records = estimator._records
    estimator._records = lambda loader, what, *rest: (passes.append(what), records(loader, what, *rest))[1]  # type: ignore[method-assign]
    torch.testing.assert_close(estimator.score(queries, train, rank=rank).values, expected.values)
    few = passes.count("training examples")
    passes.clear()
    estimator.score(queries, train)
    assert passes.count("training examples") == 8
    assert few <= 4
    assert [len(row) for row in estimator.top(queries, train, 2, rank=rank).train_ids] == [2] * 8


def test_blocks_are_joined_within_memory() -> None:
    blocks: list[Any] = [
        {"a": LowRank(normal(1, 6, r, seed=r), normal(1, r, 6)), "b": normal(1, 3)} for r in (1, 2, 1, 2)
    ]
    whole = torch.cat([block["a"].dense() for block in blocks])
    for memory, sizes in ((1, [1] * 4), (10**6, [4]), (8 * (12 + 24 + 6), [2, 2])):
        found = list(gathered(iter(blocks), memory))
        assert [len(block["b"]) for block in found] == sizes
        torch.testing.assert_close(torch.cat([dense(block["a"]) for block in found]), whole)
    for memory, keeps in ((8 * (96 + 12 + 144), True), (8 * (96 + 12 + 143), False)):  # factors, b, matrices
        [found] = gathered(iter(blocks), memory)
        assert found["a"].keeps == keeps
    mixed = list(gathered(iter([blocks[0], {"a": whole[1:2], "b": normal(1, 3)}]), 10**6))
    torch.testing.assert_close(dense(mixed[0]["a"]), whole[:2])


def test_top_and_the_mean() -> None:
    train, queries = texts(8), texts(3, seed=3)
    estimator = influence(ready(Tokens()), train)
    scores = estimator.score(queries, train, rank=1, aggregate="mean")
    found = estimator.top(queries, train, 3, rank=1, aggregate="mean")
    assert found.of() == scores.top(3)
    assert found.formula == scores.formula
    assert found.formula.endswith("mean loss of 3 queries, queries of rank 1")


@pytest.mark.parametrize("rank", [0, -1, True, 0.0, 1.5, float("nan"), "all"])
def test_arguments(rank: Any) -> None:
    for call in (
        lambda e: e.score(points(2), points(2), rank=rank),
        lambda e: e.top(points(2), points(2), 1, rank=rank),
    ):
        with pytest.raises(
            ValueError, match=r"\(rank=.*\)`: expected an int >= 1, or a share of the energy as a float"
        ):
            call(GradientDot(mlp()))


def test_where_there_is_no_low_rank() -> None:
    rows = points(3)
    with pytest.raises(
        ValueError, match=r"`CKA.score\(rank=1\)`: scores are not inner products of a query and a train"
    ):
        CKA(mlp()).score(rows, rows, rank=1)
    with pytest.raises(
        ValueError, match=r"`rank=1`: none of the 2 components, such as \['0', '2'\], has gradients that"
    ):
        ProjectedDot(mlp(), FactoredProjection(1.0)).score(rows, rows, rank=1)
