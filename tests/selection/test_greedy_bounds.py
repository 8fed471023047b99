from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection import greedy_bounds
from lightning_influence.selection.greedy_bounds import GreedyBounds

N, R = 80, 24
INF = torch.full((1,), torch.inf).double()


def pool(dtype: torch.dtype, metric: bool, scale: float = 1.0, steep: float = 1.0) -> Factors:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, R, generator=generator) * torch.arange(1, R + 1).pow(-steep) * scale
    half = torch.randn(R, R, generator=generator).double()
    return Factors.checked(
        "test", torch.randn(N, generator=generator), features.to(dtype), half + half.T if metric else None
    )


def scores(factors: Factors, w: Tensor) -> Tensor:
    return 0.5 * factors.self_interactions() - factors.values + factors.features.double() @ w


def started(factors: Factors) -> GreedyBounds:
    bounds = GreedyBounds(factors, most=N)
    bounds.refresh(torch.arange(N), scores(factors, factors.shift([])), 0)
    return bounds


def out_of_reach(bounds: GreedyBounds, w: Tensor, truth: Tensor) -> Tensor:
    """Rows that are called hopeless when the limit is just the score of the row itself: must be none."""
    table = bounds.table(w[None])
    return torch.tensor([row not in bounds.rows_below(table, truth[row : row + 1]) for row in range(N)])


@pytest.mark.parametrize("metric", [False, True], ids=["identity", "indefinite"])
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float64, 1.0), (torch.float32, 1e3), (torch.float16, 1e-3), (torch.bfloat16, 1.0)]
)
def test_bounds_never_exceed_the_score(dtype: torch.dtype, metric: bool, scale: float) -> None:
    factors = pool(dtype, metric, scale)
    bounds, rows = started(factors), torch.arange(0, N, 2)
    for step in range(3):
        w = factors.lift(factors.shift(list(range(5 * step))))
        truth = scores(factors, w)
        assert not out_of_reach(bounds, w, truth).any()
        bounds.refresh(rows, truth[rows], bounds.add_reference(w))
        assert not out_of_reach(bounds, w, truth).any()


def test_replaced_references_leave_valid_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_bounds, "REFERENCES", 3)
    factors = pool(torch.float32, True)
    bounds = started(factors)
    for step in range(5):
        w = factors.lift(factors.shift(list(range(step))))
        truth, rows = scores(factors, w), torch.arange(step, N, 5)
        bounds.refresh(rows, truth[rows], bounds.add_reference(w))
        assert not out_of_reach(bounds, w, truth).any()


def test_bounds_leave_most_rows_of_a_steep_spectrum_out() -> None:
    factors = pool(torch.float32, False, steep=2.0)
    bounds, w = started(factors), factors.shift(list(range(20)))
    truth = scores(factors, w)
    table = bounds.table(w[None])
    assert len(bounds.rows_below(table, truth.min()[None])) < N / 2
    bounds.refresh(torch.arange(N), truth, bounds.add_reference(w))


@pytest.mark.parametrize(("rows", "block"), [(2**16, 2048), (30, 7), (80, 80), (79, 16)])
def test_the_lowest_are_those_of_the_scores(rows: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_bounds, "_SORTED", rows)
    monkeypatch.setattr(greedy_bounds, "_ROWS", block)
    factors = pool(torch.float32, False, steep=2.0)
    bounds, w = started(factors), factors.shift(list(range(20)))
    truth = scores(factors, w)
    bounds.refresh(torch.arange(N), truth, bounds.add_reference(w))  # what is left out is small where they are exact
    for count in (1, 10, 40, N, N + 5):
        assert bounds.lowest(w, count).tolist() == truth.argsort()[:count].tolist()
    assert bounds.rows_below(bounds.table(w[None]), truth.median()[None]).tolist() == sorted(
        (truth <= truth.median()).nonzero().flatten().tolist()
    )


def test_rows_that_are_out_are_never_alive() -> None:
    factors = pool(torch.float32, False)
    bounds = started(factors)
    bounds.drop(7)
    alive = bounds.rows_below(bounds.table(factors.shift([3])[None]), torch.tensor([1e9]).double())
    assert sorted(set(range(N)) - set(alive.tolist())) == [7]


def test_norms_are_upper_ends() -> None:
    factors = pool(torch.float16, False)
    bounds = GreedyBounds(factors, most=1)
    assert (bounds.upper_norms(torch.arange(N)) >= factors.norms()).all()
