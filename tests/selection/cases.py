"""Pools that the selection rules are tried on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Pool:
    values: Tensor
    features: Tensor
    metric: Tensor | None
    ids: tuple[int | str, ...]

    @property
    def interactions(self) -> Tensor:
        """Dense K, one entry at a time."""
        metric = torch.eye(self.features.shape[1]).double() if self.metric is None else self.metric
        rows = self.features.double()
        return torch.tensor([[float(a @ metric @ b) for b in rows] for a in rows], dtype=torch.float64)

    def permuted(self, order: list[int]) -> Pool:
        return Pool(self.values[order], self.features[order], self.metric, tuple(self.ids[i] for i in order))


def eighths(rows: int, columns: int, bound: int) -> st.SearchStrategy[Tensor]:
    """Multiples of 1/8: few distinct numbers, so ties are common, and exact in any order of summation."""
    numbers = st.lists(st.integers(-bound, bound), min_size=rows * columns, max_size=rows * columns)
    return numbers.map(lambda x: torch.tensor(x, dtype=torch.float64).view(rows, columns) / 8)


@st.composite
def pools(draw: st.DrawFn, max_rows: int = 9) -> Pool:
    n, r = draw(st.integers(1, max_rows)), draw(st.integers(1, 4))
    distinct = draw(eighths(draw(st.integers(1, n)), r + 1, 12))
    rows = distinct[draw(st.lists(st.integers(0, len(distinct) - 1), min_size=n, max_size=n))]
    half = draw(eighths(r, r, 8))
    metric = draw(st.sampled_from([None, half @ half.T, half + half.T]))  # identity, PSD, indefinite
    names = draw(st.permutations(range(n)))
    ids = tuple(names) if draw(st.booleans()) else tuple(f"row {name}" for name in names)
    return Pool(rows[:, 0].clone(), rows[:, 1:].clone(), metric, ids)


def clustered_pool(n: int = 300, r: int = 37, dtype: torch.dtype = torch.float64) -> Pool:
    """Rows drawn from a third as many points, so most have exact twins, with numbers that do round."""
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(n // 3, (n,), generator=generator)
    features = torch.randn(n // 3, r, generator=generator)[which].to(dtype)
    values = torch.randn(n // 3, generator=generator, dtype=torch.float64)[which]
    half = torch.randn(r, r, generator=generator, dtype=torch.float64)
    return Pool(values * 20, features, half + half.T, tuple(torch.randperm(n, generator=generator).tolist()))
