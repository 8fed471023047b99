from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.estimators.pair_plan import (
    BATCH,
    Batches,
    Examples,
    Step,
    _batched,
    num_visits,
    plan,
    plan_all,
)

Pairs = list[tuple[int, int]]


def carried_out(examples: Examples, pairs: Sequence[tuple[int, int]], steps: list[Step], memory: int, batches: Batches):
    """Follow a plan, and make sure of all that it promises."""
    held: set[int] = set()
    done: list[int] = []
    for step in steps:
        assert held >= set(step.drop)
        held -= set(step.drop)
        assert held.isdisjoint(step.load)
        held |= set(step.load)
        assert sum(examples.bytes[node] for node in held) <= memory
        lengths = [examples.lengths[node] for node in step.load]
        assert len({examples.sides[node] for node in step.load}) == 1
        assert len(lengths) <= batches.examples
        assert len(lengths) == 1 or max(lengths) * len(lengths) <= batches.positions
        assert all(set(pairs[number]) <= held for number in step.pairs)
        done += step.pairs
    assert sorted(done) == list(range(len(pairs)))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Examples, Pairs, int, Batches]:
    q, n = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, 9), min_size=q + n, max_size=q + n))
    sizes = [3 * length + draw(st.integers(0, 2)) for length in lengths]
    everything = [(a, q + b) for a in range(q) for b in range(n)]
    pairs = draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
    need = max(sizes[:q]) + max(sizes[q:])
    memory = need + draw(st.integers(0, 200))
    return (
        Examples([0] * q + [1] * n, lengths, sizes),
        pairs,
        memory,
        Batches(draw(st.integers(1, 40)), draw(st.integers(1, 5))),
    )


@given(problem=problems())
def test_every_pair_meets_once_within_the_memory(problem: tuple[Examples, Pairs, int, Batches]) -> None:
    examples, pairs, memory, batches = problem
    steps = plan(examples, pairs, memory=memory, batches=batches)
    carried_out(examples, pairs, steps, memory, batches)
    assert steps == plan(examples, pairs, memory=memory, batches=batches)
    assert {node for step in steps for node in step.load} == {node for pair in pairs for node in pair}


@given(problem=problems())
def test_all_pairs_meet_once_within_the_memory(problem: tuple[Examples, Pairs, int, Batches]) -> None:
    examples, _, memory, batches = problem
    q = examples.sides.count(0)
    pairs = [(a, b) for a in range(q) for b in range(q, len(examples))]
    steps = plan_all(examples, memory=memory, batches=batches)
    carried_out(examples, pairs, steps, memory, batches)


def neighbours(n: int, k: int) -> tuple[Examples, Pairs]:
    """Each of n queries with the k training examples around its own."""
    pairs = [(i, n + j) for i in range(n) for j in range(max(0, i - k // 2), min(n, i + k // 2 + 1))]
    return Examples([0] * n + [1] * n, [10] * (2 * n), [100] * (2 * n)), pairs


@pytest.mark.parametrize("memory", [3200, 6400, 40000])
def test_with_room_for_a_neighbourhood_nothing_is_visited_twice(memory: int) -> None:
    examples, pairs = neighbours(100, 5)
    steps = plan(examples, pairs, memory=memory, batches=Batches(80, 8))
    assert num_visits(steps) == 200
    assert max(len(step.load) for step in steps) > 2


def test_little_memory_costs_visits_and_much_memory_none() -> None:
    examples, pairs = neighbours(60, 7)
    visits = [num_visits(plan(examples, pairs, memory=m, batches=Batches(40, 4))) for m in (200, 400, 1000, 12000)]
    assert visits == sorted(visits, reverse=True)
    assert visits[0] > visits[-1] == 120
    assert visits[0] <= 2 * len(pairs)


def test_all_pairs_keep_the_side_that_makes_fewer_visits() -> None:
    few = Examples([0] * 2 + [1] * 50, [5] * 52, [10] * 52)
    assert num_visits(plan_all(few, memory=40, batches=Batches(100, 10))) == 52
    many = Examples([0] * 50 + [1] * 2, [5] * 52, [10] * 52)
    assert num_visits(plan_all(many, memory=40, batches=Batches(100, 10))) == 52


def test_memory_for_less_than_a_pair_is_refused() -> None:
    examples = Examples([0, 1, 1], [3, 4, 1], [30, 40, 10])
    with pytest.raises(ValueError, match=r"memory_budget=69: .* up to 70 bytes .* at least 70 bytes"):
        plan(examples, [(0, 1), (0, 2)], memory=69, batches=Batches(9, 9))
    with pytest.raises(ValueError, match="at least 70 bytes"):
        plan_all(examples, memory=69, batches=Batches(9, 9))
    assert plan(examples, [(0, 2)], memory=40, batches=Batches(9, 9))
    assert plan(examples, [], memory=0, batches=Batches(9, 9)) == []


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=7), positions=st.integers(1, 900), most=st.integers(1, 4)
)
def test_batches_take_the_least_time_that_cuts_of_the_sorted_examples_can(
    lengths: list[int], positions: int, most: int
) -> None:
    """Against all ways to cut them."""
    nodes, batches = list(range(len(lengths))), Batches(positions, most)
    found = _batched(Examples([0] * len(nodes), lengths, lengths), nodes, batches)
    ordered = sorted(nodes, key=lambda node: (-lengths[node], node))
    assert [node for load in found for node in load] == ordered

    def time(loads: Sequence[Sequence[int]]) -> float:
        return sum(BATCH + len(load) * lengths[load[0]] for load in loads)

    def allowed(load: Sequence[int]) -> bool:
        return len(load) == 1 or (len(load) <= most and len(load) * lengths[load[0]] <= positions)

    cuts = (inner for k in range(len(nodes)) for inner in combinations(range(1, len(nodes)), k))
    ways = [[ordered[a:b] for a, b in zip((0, *cut), (*cut, len(nodes)), strict=True)] for cut in cuts]
    assert time(found) == min(time(way) for way in ways if all(map(allowed, way)))
