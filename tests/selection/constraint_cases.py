"""Tiny pools with constraints, and by trying all subsets what they allow."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction
from typing import Any

from hypothesis import strategies as st

from lightning_influence.selection import Constraints, SelectionRule, TokenBudget
from tests.selection.cases import Pool, pools

SOURCES = ["web", "books", "code"]


class Problem:
    """A tiny pool with constraints drawn at random, which may be impossible, and all selections that meet them."""

    def __init__(self, draw: st.DrawFn, costs: bool) -> None:
        self.pool: Pool = draw(pools(max_rows=6))
        names, n = self.pool.ids, len(self.pool.ids)
        some = st.lists(st.sampled_from(names), unique=True, max_size=2)
        self.first, self.out = draw(some), draw(some)
        self.sources = dict(zip(names, draw(st.lists(st.sampled_from(SOURCES), min_size=n, max_size=n)), strict=True))
        present = sorted(set(self.sources.values()))
        few = st.integers(0, 3)
        quota = st.none() | few | st.dictionaries(st.sampled_from(present), few, max_size=2)
        self.low, self.high = draw(quota), draw(quota)
        self.duplicates = draw(st.sampled_from(["allow", "first"]))
        powers = st.lists(st.sampled_from([1, 2, 4, 8]), min_size=n, max_size=n)  # exact as shares
        self.costs = dict(zip(names, draw(powers), strict=True)) if costs and draw(st.booleans()) else None
        self.tokens = dict(zip(names, draw(st.lists(st.integers(1, 5), min_size=n, max_size=n)), strict=True))
        self.in_tokens = draw(st.booleans())
        self.budget = draw(st.integers(1, sum(self.tokens.values()) if self.in_tokens else n))

    def constraints(self) -> Constraints:
        return Constraints(
            must_include=self.first,
            exclude=self.out,
            sources=self.sources,
            min_per_source=self.low,
            max_per_source=self.high,
            duplicates=self.duplicates,
            costs=self.costs,
        )

    def select(self, rule: SelectionRule) -> tuple[int, ...]:
        budget = TokenBudget(self.budget, counts=self.tokens) if self.in_tokens else self.budget
        pool = self.pool
        options = {"budget": budget, "ids": pool.ids, "constraints": self.constraints()}
        return rule.select(pool.values, pool.features, pool.metric, **options).positions

    @property
    def required(self) -> list[int]:
        return [self.pool.ids.index(name) for name in self.first]

    def candidates(self) -> list[int]:
        """Rows that may be picked at all: of equal ones the smallest id, or one that must be included."""
        rows = [row for row, name in enumerate(self.pool.ids) if name not in self.out]
        if self.duplicates == "allow":
            return rows
        kept: dict[Any, int] = {}
        for row in sorted(rows, key=lambda row: (row not in self.required, self.pool.ids[row])):
            kept.setdefault((float(self.pool.values[row]), *self.pool.features[row].tolist()), row)
        return list(kept.values())

    def complete(self) -> list[set[int]]:
        names = self.pool.ids
        found = []
        rows = self.candidates()
        for size in range(1, len(rows) + 1):
            for chosen in itertools.combinations(rows, size):
                counts = Counter(self.sources[names[row]] for row in chosen)
                low = all(counts[s] >= bound(self.low, s, 0) for s in set(self.sources.values()))
                high = all(counts[s] <= bound(self.high, s, 99) for s in set(self.sources.values()))
                spent = sum(self.tokens[names[row]] for row in chosen)
                fits = spent <= self.budget if self.in_tokens else size == self.budget
                if low and high and fits and set(self.required) <= set(chosen):
                    found.append(set(chosen))
        return found

    def per_cost(self, loss: float, row: int) -> Fraction:
        """What a row that changes the loss so much is compared by: smaller is better."""
        change = Fraction(loss).limit_denominator(2**20)
        return change / self.costs[self.pool.ids[row]] if self.costs and change < 0 else change


def bound(quota: Any, source: str, default: int) -> int:
    return quota.get(source, default) if isinstance(quota, dict) else default if quota is None else quota


@st.composite
def problems(draw: st.DrawFn, costs: bool = True) -> Problem:
    return Problem(draw, costs)
