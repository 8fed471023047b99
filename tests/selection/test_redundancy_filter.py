from __future__ import annotations

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_influence.selection import RedundancyFilter, redundancy_filter


def reference(quality: list[float], vectors: torch.Tensor, ids: list[int], threshold: float) -> list[int]:
    """Every row that deita keeps, in order: the best first, with nothing kept before it that is too near."""
    kept: list[int] = []
    for k in sorted(range(len(ids)), key=lambda k: (-quality[k], ids[k])):
        near = False
        for j in kept:
            lengths = float(vectors[k].norm()) * float(vectors[j].norm())
            cosine = float((vectors[k] * vectors[j]).sum()) / lengths if lengths > 0 else 0.0
            near = near or cosine > threshold
        if not near:
            kept.append(k)
    return [ids[k] for k in kept]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 12), seed=st.integers(0, 10**6), threshold=st.sampled_from([-0.5, 0.0, 0.7, 0.95]))
def test_the_reference(n: int, seed: int, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redundancy_filter, "BLOCK", 4)  # several blocks
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    vectors[torch.rand(n, generator=generator) < 0.2] = 0
    quality = torch.randint(4, (n,), generator=generator).double()
    ids = torch.randperm(n, generator=generator).tolist()
    expected = reference(quality.tolist(), vectors, ids, threshold)
    rule, given_to_rule = RedundancyFilter(threshold), RedundancyFilter(threshold, vectors, ids)
    for budget in range(1, len(expected) + 1):
        assert list(rule.select(quality, vectors, budget=budget, ids=ids).ids) == expected[:budget]
        assert list(given_to_rule.select(quality, budget=budget, ids=ids).ids) == expected[:budget]
    if len(expected) < n:
        message = f"only {len(expected)} of {n} rows have no cosine above {threshold} with a better one."
        with pytest.raises(ValueError, match=re.escape(message)):
            rule.select(quality, vectors, budget=len(expected) + 1, ids=ids)


def test_no_cosine_is_above_one() -> None:
    vectors = torch.randn(1, 7).expand(40, 7) * torch.rand(40, 1)
    assert len(RedundancyFilter(1).select(torch.zeros(40), vectors, budget=1.0)) == 40


def test_embeddings_may_be_of_a_larger_pool_and_of_any_kind() -> None:
    rule = RedundancyFilter(0.5, torch.eye(4)[[0, 1, 1, 2]].numpy())
    assert rule.select(torch.tensor([1.0, 2.0, 3.0]), budget=2, ids=[0, 1, 2]).ids == (2, 0)
    assert repr(rule) == "RedundancyFilter(threshold=0.5)"


@pytest.mark.parametrize("threshold", [-1, 1.01, True, "0.9", None])
def test_bad_thresholds(threshold: object) -> None:
    with pytest.raises(ValueError, match=re.escape("expected a cosine in (-1, 1], such as 0.9")):
        RedundancyFilter(threshold)
