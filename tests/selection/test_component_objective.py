from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_influence.selection.component_objective import (
    EVALUATE,
    OBJECTIVES,
    Block,
    Sums,
    accuracy,
    reciprocal_rank,
    similarity,
    unit_deviations,
)


def sums(dots: list[list[list[float]]], squares: float = 1.0, query_squares: float = 1.0) -> Sums:
    """Of [m, k, q]; with unit lengths the dots are the cosines."""
    values = torch.tensor(dots, dtype=torch.float64)
    m, _, q = values.shape
    own = torch.full((m, q), query_squares, dtype=torch.float64)
    return Sums(values, torch.full_like(values, squares), own, torch.empty_like(values))


def block(whole: Tensor | None = None, padding: Tensor | None = None, zeros: bool = False, eps: float = 0.0) -> Block:
    return Block(padding, zeros, eps, torch.zeros(1) if whole is None else whole)


def columns(*queries: list[float]) -> list[list[list[float]]]:
    """One set of components; a list of candidates for each query, the source first."""
    return [[list(row) for row in zip(*queries, strict=True)]]


def test_every_objective_has_its_function():
    assert set(EVALUATE) == set(OBJECTIVES)


def test_hits_and_ranks():
    dots = columns([0.9, 0.5, 0.9], [0.9, 0.5, 0.1], [-0.5, -0.6, -0.7], [-0.5, 0.1, -0.4])
    assert accuracy(sums(dots), block()).tolist() == [[False, True, True, False]]
    assert reciprocal_rank(sums(dots), block())[0].tolist() == pytest.approx([1 / 2, 1, 1, 1 / 3])


def test_signs_survive_the_squares():
    assert accuracy(sums(columns([-0.5, -0.9])), block()).tolist() == [[1.0]]
    assert accuracy(sums(columns([-0.9, -0.5])), block()).tolist() == [[0.0]]
    assert accuracy(sums(columns([0.1, -0.9])), block()).tolist() == [[1.0]]


def test_without_a_gradient_the_cosine_is_zero():
    for nothing in ({"squares": 0.0}, {"query_squares": 0.0}):
        dots = sums(columns([0.5, 0.1]), **nothing)
        assert reciprocal_rank(dots, block(zeros=True)).tolist() == [[0.5]]


def test_padding_is_below_everything():
    padding = torch.tensor([[False], [True]])
    assert accuracy(sums(columns([-0.9, 0.5])), block(padding=padding)).tolist() == [[1.0]]
    assert reciprocal_rank(sums(columns([-0.9, 0.5])), block(padding=padding)).tolist() == [[1.0]]


def test_epsilon_moves_short_candidates_down():
    """cos = D / (|q| |j| + ε): 0.9 / 1 against 0.095 / 0.1, and with ε 0.9 / 1.5 against 0.095 / 0.6."""
    short = sums(columns([0.9, 0.095]))
    short.squares[:, 1] = 0.01
    assert accuracy(Sums(short.dots.clone(), short.squares, short.query_squares, short.spare), block()).item() == 0
    assert accuracy(short, block(eps=0.5)).item() == 1


CANDIDATES = [0.9, 0.1, 0.2]


@pytest.mark.parametrize(
    ("of_subset", "of_whole", "expected"),
    [
        (CANDIDATES, CANDIDATES, 1.0),
        ([0.45, 0.05, 0.1], CANDIDATES, 1.0),
        ([-0.9, -0.1, -0.2], CANDIDATES, -1.0),
        ([0.3, 0.3, 0.3], CANDIDATES, 0.0),
        (CANDIDATES, [0.3, 0.3, 0.3], 0.0),
        ([0.3, 0.3, 0.3], [0.1, 0.1, 0.1], 1.0),
        ([0.3, 0.3 + 1e-15, 0.3], [0.1, 0.1, 0.1], 1.0),
        ([0.9, 0.1, 0.1], [0.1, 0.9, 0.1], -0.5),
    ],
)
def test_correlation_and_its_convention_for_constants(of_subset, of_whole, expected):
    whole = unit_deviations(sums(columns(of_whole)), block())[0]
    assert similarity(sums(columns(of_subset)), block(whole)).item() == pytest.approx(expected, abs=1e-12)


def test_correlation_leaves_padding_out():
    padding = torch.tensor([[False], [False], [False], [True]])
    whole = unit_deviations(sums(columns([*CANDIDATES, 7.0])), block(padding=padding))[0]
    assert whole[3].item() == 0
    assert whole.square().sum().item() == pytest.approx(1)
    found = similarity(sums(columns([0.45, 0.05, 0.1, -9.0])), block(whole, padding))
    assert found.item() == pytest.approx(1)


def test_a_single_candidate_agrees_with_itself():
    padding = torch.tensor([[False], [True]])
    whole = unit_deviations(sums(columns([0.4, 0.0])), block(padding=padding))[0]
    assert similarity(sums(columns([0.2, 0.0])), block(whole, padding)).item() == 1
