"""Products of gradients that exist, for the tests of everything that chooses components."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.selection.component_pairs import ComponentPairs


def of_gradients(
    queries: Tensor, candidates: Tensor, target: Tensor, valid: Tensor | None = None, sizes: list[int] | None = None
) -> ComponentPairs:
    """From gradients [c, q, d] and [c, q, k, d]."""
    c = len(queries)
    return ComponentPairs(
        components=tuple(f"layers.{row}.q_proj" for row in range(c)),
        sizes=tuple(sizes or range(1, c + 1)),
        dots=torch.einsum("cqd,cqkd->cqk", queries, candidates),
        query_squares=queries.square().sum(-1),
        candidate_squares=candidates.square().sum(-1),
        target=target,
        valid=valid,
    )


def whole_numbers(draw: st.DrawFn, *shape: int) -> Tensor:
    """−2 to 2 in float64: sums are exact in any order, ties and gradients of zero are common."""
    count = torch.Size(shape).numel()
    numbers = draw(st.lists(st.integers(-2, 2), min_size=count, max_size=count))
    return torch.tensor(numbers, dtype=torch.float64).view(shape)


@st.composite
def small_pairs(draw: st.DrawFn, max_components: int = 4, max_queries: int = 4) -> ComponentPairs:
    c, q, k = draw(st.integers(1, max_components)), draw(st.integers(1, max_queries)), draw(st.integers(1, 4))
    d = draw(st.integers(1, 2))
    target = torch.tensor(draw(st.lists(st.integers(0, k - 1), min_size=q, max_size=q)))
    valid = None
    if draw(st.booleans()):
        flags = draw(st.lists(st.booleans(), min_size=q * k, max_size=q * k))
        valid = torch.tensor(flags).view(q, k).scatter(1, target[:, None], True)
    return of_gradients(whole_numbers(draw, c, q, d), whole_numbers(draw, c, q, k, d), target, valid)


def noisy_pairs(
    c: int = 12, q: int = 60, k: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64, noise: float = 4.0
) -> ComponentPairs:
    """Candidates share a topic with the query; components differ in how much of the source the query keeps."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randn(c, q, 6, generator=generator, dtype=torch.float64)
    candidates = topic[:, :, None] + torch.randn(c, q, k, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(k, (q,), generator=generator)
    sources = candidates[:, torch.arange(q), target]
    blur = noise * torch.linspace(0.3, 1, c, dtype=torch.float64)[torch.randperm(c, generator=generator)]
    queries = sources + blur[:, None, None] * torch.randn(c, q, 6, generator=generator, dtype=torch.float64)
    return of_gradients(queries.to(dtype), candidates.to(dtype), target)
