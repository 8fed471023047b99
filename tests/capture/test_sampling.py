from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.capture.sampling import BLOCK, Uniforms, sample_categories

SIZES = [2, BLOCK, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK, 1000]  # one stage, and two with full and partial blocks


@given(
    ids=st.lists(st.integers(0, 2**62), min_size=2, max_size=6, unique=True),
    seed=st.integers(-(2**70), 2**70),
    data=st.data(),
)
def test_numbers_depend_on_id_seed_and_counter_alone(ids: list[int], seed: int, data: st.DataObject) -> None:
    counters = torch.arange(5).expand(len(ids), -1)
    numbers = Uniforms(torch.tensor(ids), seed)(counters)
    order = data.draw(st.permutations(range(len(ids))))
    shuffled = Uniforms(torch.tensor([ids[k] for k in order]), seed)(counters)
    assert torch.equal(shuffled, numbers[order])
    assert torch.equal(Uniforms(torch.tensor(ids[:1]), seed)(counters[:1, 2:]), numbers[:1, 2:])
    assert len(set(numbers.flatten().tolist())) == numbers.numel()
    assert not torch.isin(Uniforms(torch.tensor(ids), seed + 1)(counters), numbers).any()


def test_numbers_are_uniform_and_independent() -> None:
    numbers = Uniforms(torch.arange(300), seed=0)(torch.arange(300).expand(300, -1))
    assert numbers.dtype == torch.float64
    assert 0 < numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    counts = torch.histc(numbers.flatten(), 100, 0, 1)
    chi_square = ((counts - 900).square() / 900).sum()
    assert 60 < chi_square < 148  # 99 degrees of freedom: 0.1 % on either side
    for shifted in (numbers[1:, :], numbers[:, 1:]):
        start = numbers[: len(shifted), : shifted.shape[1]]
        correlation = torch.corrcoef(torch.stack([start.flatten(), shifted.flatten()]))[0, 1]
        assert abs(correlation) < 3.3 / 300


def test_shapes_of_counters() -> None:
    assert Uniforms(torch.arange(3), 0)(torch.zeros(3, dtype=torch.int64)).shape == (3,)
    assert Uniforms(torch.arange(3), 0)(torch.zeros(3, 2, 4, dtype=torch.int64)).shape == (3, 2, 4)


@pytest.mark.parametrize("size", SIZES)
def test_categories_follow_the_logits(size: int) -> None:
    torch.manual_seed(size)
    logits = torch.randn(size) * 2
    draws = 40_000
    found = sample_categories(logits.expand(draws, -1), Uniforms(torch.arange(draws), 1)(torch.zeros(draws)))
    expected = logits.softmax(0) * draws
    counts = torch.bincount(found, minlength=size)
    often = expected > 5
    chi_square = ((counts - expected).square() / expected)[often].sum()
    freedom = int(often.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 4


@given(size=st.sampled_from(SIZES), scale=st.sampled_from([0.0, 1.0, 50.0, 1e4]), low=st.booleans())
def test_categories_equal_the_inverse_of_the_distribution_function(size: int, scale: float, low: bool) -> None:
    torch.manual_seed(size)
    logits = torch.randn(20, size, dtype=torch.float64) * scale - 1e5 * low
    draws = torch.rand(20, dtype=torch.float64)
    edges = logits.softmax(1).cumsum(1)
    found = sample_categories(logits, draws)
    below = torch.where(found > 0, edges.gather(1, (found - 1).clamp_min(0)[:, None])[:, 0], torch.zeros(()))
    above = edges.gather(1, found[:, None])[:, 0]
    assert (below <= draws + 1e-12).all()
    assert (draws - 1e-12 <= above).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("draw", [2.0**-54, 0.5, 1 - 2.0**-54])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_impossible_categories_are_never_drawn(size: int, draw: float, dtype: torch.dtype) -> None:
    logits = torch.full((1, size), -torch.inf, dtype=dtype)
    logits[0, size // 2] = 3.0
    logits[0, 0] = 1.0
    found = sample_categories(logits, torch.tensor([draw], dtype=torch.float64))
    assert found.item() in (0, size // 2)
    if draw > 0.9:
        assert found.item() == size // 2


def test_nothing_to_draw_and_numbers_that_are_none() -> None:
    assert sample_categories(torch.zeros(0, 7), torch.zeros(0)).shape == (0,)
    for size in SIZES:  # the loss of such a label is NaN, which is what gets reported
        label = sample_categories(torch.full((1, size), torch.nan), torch.tensor([0.5], dtype=torch.float64))
        assert 0 <= label.item() <= -(-size // BLOCK) * BLOCK
