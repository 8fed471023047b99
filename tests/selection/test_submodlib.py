from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.selection import Constraints, FacilityLocation, Submodlib, TokenBudget
from tests.selection import test_base as laws

# submodlib compares with a name that SciPy has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:Please import `csr_matrix`:DeprecationWarning")
with_package = pytest.mark.skipif(importlib.util.find_spec("submodlib") is None, reason="submodlib-py is not installed")

LAMBDA = {"graph-cut": 0.6, "log-determinant": 0.3}
FUNCTIONS = ["facility-location", "graph-cut", "log-determinant", "disparity-sum", "disparity-min"]
every_function = pytest.mark.parametrize("function", FUNCTIONS)


def rule_of(function: str, *given: Any, **options: Any) -> Submodlib:
    return Submodlib(function, *given, lambda_val=LAMBDA.get(function), **options)  # type: ignore[arg-type]


def value(function: str, cosines: list[list[float]], chosen: list[int]) -> float:
    """The set function of some rows, from one pair of rows at a time."""
    if not chosen:
        return 0.0
    similar = [[max(cosine, 0.0) for cosine in row] for row in cosines]
    if function == "facility-location":
        return sum(max(row[j] for j in chosen) for row in similar)
    if function == "graph-cut":
        return sum(row[j] for row in similar for j in chosen) - 0.6 * sum(similar[i][j] for i in chosen for j in chosen)
    if function == "log-determinant":
        block = np.array([[cosines[i][j] for j in chosen] for i in chosen])
        return float(np.linalg.slogdet(block + 0.3 * np.eye(len(chosen)))[1])
    distances = [1 - similar[i][j] for k, i in enumerate(chosen) for j in chosen[:k]]
    return sum(distances) if function == "disparity-sum" else min(distances, default=0.0)


def cosines_of(vectors: torch.Tensor) -> list[list[float]]:
    found: list[list[float]] = torch.nn.functional.cosine_similarity(vectors[:, None], vectors, dim=2).tolist()
    return found


def check_greedy(
    function: str, vectors: torch.Tensor, picks: Sequence[int], candidates: Callable[[list[int]], dict[int, float]]
) -> None:
    """Each pick has the best gain per cost, to float32, among those that ``candidates`` has with their costs."""
    cosines, chosen = cosines_of(vectors), list[int]()
    for pick in picks:
        before = value(function, cosines, chosen)
        costs = candidates(chosen)
        gains = {k: (value(function, cosines, [*chosen, k]) - before) / cost for k, cost in costs.items()}
        assert gains[pick] >= max(gains.values()) - 1e-5
        chosen.append(pick)


def draw(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clusters(n: int = 300, d: int = 16) -> torch.Tensor:
    return draw(12, d).repeat_interleave(n // 12, 0) + 0.3 * draw(n, d, seed=1)


@with_package
@every_function
@pytest.mark.parametrize("optimizer", ["NaiveGreedy", "LazyGreedy"])
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 7), d=st.integers(2, 4), seed=st.integers(0, 10**6))
def test_the_picks_of_the_greedy_that_tries_all(function: str, optimizer: str, n: int, d: int, seed: int) -> None:
    if optimizer == "LazyGreedy" and function.startswith("disparity"):
        return
    vectors = draw(n, d, seed)
    rule = rule_of(function, optimizer=optimizer)
    for budget in (n, (n + 1) // 2):
        picks = rule.select(torch.zeros(n), vectors, budget=budget).positions
        check_greedy(function, vectors, picks, lambda chosen: {k: 1 for k in range(n) if k not in chosen})


@with_package
@pytest.mark.parametrize("vectors", [draw(300, 16), clusters(), draw(200, 3)], ids=["random", "clustered", "flat"])
@pytest.mark.parametrize("optimizer", ["NaiveGreedy", "LazyGreedy"])
def test_facility_location_is_ours(vectors: torch.Tensor, optimizer: Any) -> None:
    values, ids = draw(len(vectors), 1, seed=2)[:, 0], torch.randperm(len(vectors)).tolist()
    theirs = Submodlib(embeddings=vectors, ids=ids, optimizer=optimizer).select(values, vectors, budget=60, ids=ids)
    ours = FacilityLocation(vectors, ids).select(values, vectors, budget=60, ids=ids)
    assert theirs.ids == ours.ids
    assert torch.equal(theirs.gains, ours.gains)


@with_package
def test_equal_rows_by_id() -> None:
    vectors = torch.eye(5).repeat(4, 1)
    ids = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    rule, ours = Submodlib(embeddings=vectors, ids=ids), FacilityLocation(vectors, ids)
    assert rule.select(torch.zeros(20), budget=20, ids=ids).ids == ours.select(torch.zeros(20), budget=20, ids=ids).ids


LAWS = [
    laws.test_right_size_unique_and_labelled,
    laws.test_gains_are_those_of_the_group,
    laws.test_prefix,
    laws.test_a_permuted_pool_gives_the_same_ids,
    laws.test_other_names_in_the_same_order_give_the_same_rows,
    laws.test_twins_whose_numbers_round_are_still_ties,
    laws.test_inputs_and_the_generator_are_untouched,
    laws.test_a_share_is_its_count,
    laws.test_one_row,
    laws.test_tensors_with_gradients_are_taken_as_they_are,
    laws.test_round_trip_through_json,
]


@with_package
@every_function
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_laws_of_every_rule(law: Callable[..., None], function: str) -> None:
    law(rule=rule_of(function))


@with_package
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("optimizer", ["LazyGreedy", "StochasticGreedy"])
def test_the_laws_with_other_optimizers(law: Callable[..., None], optimizer: Any) -> None:
    if optimizer == "LazyGreedy" or law is not laws.test_prefix:
        law(rule=Submodlib(optimizer=optimizer))


@with_package
@every_function
def test_constraints_that_ask_for_nothing(function: str) -> None:
    laws.test_constraints_that_ask_for_nothing_change_nothing(rule=rule_of(function))


@with_package
@pytest.mark.parametrize("case", laws.BAD)
def test_bad_input(case: str) -> None:
    laws.test_bad_input_is_refused(Submodlib(), case)


@with_package
@pytest.mark.parametrize("optimizer", ["LazyGreedy", "StochasticGreedy"])
def test_other_optimizers_cover_nearly_as_much(optimizer: Any) -> None:
    vectors = draw(60, 8)
    cosines = cosines_of(vectors)
    best = value(
        "facility-location", cosines, list(FacilityLocation().select(torch.zeros(60), vectors, budget=10).positions)
    )
    plain = value("facility-location", cosines, list(range(10)))
    rows = Submodlib(optimizer=optimizer).select(torch.zeros(60), vectors, budget=10).positions
    assert value("facility-location", cosines, list(rows)) > plain + 0.7 * (best - plain)


@with_package
@every_function
def test_excluded_rows_are_not_picked_and_are_represented(function: str) -> None:
    vectors = draw(9, 3)
    limits = Constraints(exclude=[1, 4, 8])
    allowed = [0, 2, 3, 5, 6, 7]
    for budget in (1, 4, 6):
        picks = rule_of(function).select(torch.zeros(9), vectors, budget=budget, constraints=limits).positions
        check_greedy(function, vectors, picks, lambda chosen: {k: 1 for k in allowed if k not in chosen})
        assert len(picks) == budget


@with_package
def test_only_one_of_equal_rows() -> None:
    vectors = draw(8, 3).repeat(2, 1)
    limits = Constraints(duplicates="first")
    found = Submodlib("disparity-sum").select(torch.zeros(16), vectors, budget=8, constraints=limits)
    assert sorted(found.ids) == list(range(8))


@with_package
@every_function
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 7), seed=st.integers(0, 10**6), data=st.data(), per_cost=st.booleans())
def test_tokens(function: str, n: int, seed: int, data: st.DataObject, per_cost: bool) -> None:
    vectors = draw(n, 3, seed)
    tokens = data.draw(st.lists(st.integers(1, 900), min_size=n, max_size=n))
    room = data.draw(st.integers(min(tokens), sum(tokens) + 1000))
    limits = Constraints(costs=tokens if per_cost else None)
    budget = TokenBudget(room, counts=tokens)
    picks = rule_of(function).select(torch.zeros(n), vectors, budget=budget, constraints=limits).positions

    def candidates(chosen: list[int]) -> dict[int, float]:
        left = room - sum(tokens[k] for k in chosen)
        assert left >= 0
        return {k: tokens[k] if per_cost else 1 for k in range(n) if k not in chosen and tokens[k] <= left}

    check_greedy(function, vectors, picks, candidates)
    assert not candidates(list(picks))


@with_package
@pytest.mark.parametrize("optimizer", ["NaiveGreedy", "LazyGreedy"])
def test_it_stops_where_the_gain_is_negative(optimizer: Any) -> None:
    rule, vectors = Submodlib("graph-cut", lambda_val=0.9, optimizer=optimizer), draw(12, 2).abs()
    order = [int(name) for name in rule.select(torch.zeros(12), vectors, budget=1.0).ids]

    def total(k: int) -> float:
        similar = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[order[:k]], dim=2)
        return float(similar.sum() - 0.9 * similar[order[:k]].sum())

    expected = next(k for k in range(12) if total(k + 1) < total(k))
    stop = Constraints(stop_if_negative_gain=True)
    assert 1 < expected < 12
    for budget in (12, 11, expected):
        assert list(rule.select(torch.zeros(12), vectors, budget=budget, constraints=stop).ids) == order[:expected]


@with_package
def test_the_last_row_is_asked_for_its_gain_too() -> None:
    vectors, stop = torch.ones(3, 1), Constraints(stop_if_negative_gain=True)
    for weight, expected in ((0.59, 3), (0.61, 2)):  # gains are 3 − λ, 3 − 3 λ and 3 − 5 λ
        rule = Submodlib("graph-cut", lambda_val=weight)
        assert len(rule.select(torch.zeros(3), vectors, budget=3, constraints=stop)) == expected


@with_package
def test_any_object_of_submodlib() -> None:
    import submodlib

    vectors, queries = draw(20, 4), draw(2, 4, seed=3)
    seen: dict[int, torch.Tensor] = {}

    def mutual(data: np.ndarray[Any, Any], ids: list[Any]) -> Any:
        seen.update(zip(ids, torch.from_numpy(data), strict=True))
        return submodlib.FacilityLocationVariantMutualInformationFunction(
            n=len(data), num_queries=2, data=data, queryData=queries.numpy(), metric="cosine"
        )

    rule, names = Submodlib(mutual, 3 * vectors, list(range(40, 60))), list(range(40, 60))
    found = rule.select(torch.zeros(20), budget=5, ids=names)
    similar = torch.nn.functional.cosine_similarity(vectors[:, None], queries, dim=2)
    assert {40 + int(similar[:, k].argmax()) for k in range(2)} <= set(found.ids[:3])
    assert all(torch.equal(seen[name], 3 * vectors[name - 40]) for name in names)
    assert repr(rule) == "Submodlib('mutual', optimizer='NaiveGreedy')"


class Broken:
    effective_ground = frozenset(range(4))

    def __init__(self, picks: list[int]) -> None:
        self.picks = picks

    def maximize(self, *args: Any, **options: Any) -> list[tuple[int, float]]:
        return [(pick, math.nan) for pick in self.picks]


def test_objects_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for built, message in (
        (3, "to build an object of submodlib over 4 elements, got int over 0."),
        (Broken([0, 1, 0]), "submodlib picked [0, 1, 0] of 4 rows. Expected gains that are numbers."),
        (Broken([-1, -1, -1]), "submodlib picked [-1, -1, -1] of 4 rows."),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Submodlib(lambda data, ids, built=built: built).select(torch.zeros(4), torch.eye(4), budget=3)


REFUSED: dict[str, tuple[dict[str, Any], Any, Constraints | None, str]] = {
    "must_include": ({}, 2, Constraints(must_include=[1]), "Expected no must_include; FacilityLocation"),
    "minimum": (
        {},
        2,
        Constraints(sources=[0, 0, 1], min_per_source=1, max_per_source=2),
        "Expected no min_per_source or max_per_source",
    ),
    "costs of rows": ({}, 2, Constraints(costs=[1, 2, 3]), "Expected TokenBudget(..., counts=costs)"),
    "other costs": ({}, TokenBudget(5, counts=[1, 2, 3]), Constraints(costs=[1, 2, 4]), "spent in the same costs"),
    "lazy tokens": (
        {"optimizer": "LazyGreedy"},
        TokenBudget(5, counts=[1, 2, 3]),
        None,
        "expected optimizer='NaiveGreedy' with a budget in tokens",
    ),
    "many tokens": (
        {},
        TokenBudget(2**25, counts=[2**24, 1, 3]),
        None,
        "exact up to 16,777,216. Expected no more than that, got 16,777,220",
    ),
    "small sample": (
        {"optimizer": "StochasticGreedy", "epsilon": 0.6},
        2,
        None,
        "expected an epsilon below exp(−k / n) = 0.513, so that at least one of 3 rows is drawn for each of 2 picks",
    ),
    "small lambda": (
        {"function": "log-determinant", "lambda_val": 1e-7},
        2,
        None,
        "expected lambda_val >= n / 2²⁴ = 1.79e-07",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_submodlib_cannot_keep_to_is_refused_before_it_runs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    options, budget, constraints, message = REFUSED[case]
    monkeypatch.setattr("importlib.import_module", lambda name: None)
    with pytest.raises(ValueError, match=re.escape(message)):
        Submodlib(**options).select(torch.zeros(3), torch.eye(3), budget=budget, constraints=constraints)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "`Submodlib` needs the package submodlib-py, which is not installed: pip install submodlib-py"
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}.*$"):
        Submodlib("graph-cut", lambda_val=0.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": "FacilityLocation"}, "expected one of ['facility-location', 'graph-cut'"),
        ({"function": None}, "or a function of embeddings and ids"),
        ({"optimizer": "LazierThanLazyGreedy"}, "crashes where gains are 0"),
        ({"optimizer": "lazy"}, "expected one of ['NaiveGreedy', 'LazyGreedy', 'StochasticGreedy']"),
        ({"function": "disparity-min", "optimizer": "LazyGreedy"}, "expected a function with falling returns"),
        ({"epsilon": 1.0}, "expected a number in (0, 1)"),
        ({"lambda_val": 0.5}, "expected function to be one of ('graph-cut', 'log-determinant')"),
        ({"function": "graph-cut"}, "lambda_val=None)`: expected a finite number >= 0."),
        ({"function": "graph-cut", "lambda_val": -1}, "expected a finite number >= 0."),
        ({"function": "log-determinant", "lambda_val": 0}, "expected a finite number > 0."),
        ({"function": "log-determinant", "lambda_val": math.inf}, "expected a finite number > 0."),
        ({"embeddings": torch.ones(3)}, "`Submodlib(embeddings)`: expected real numbers [n, d]"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Submodlib(**arguments)
