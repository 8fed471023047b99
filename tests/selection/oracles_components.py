"""Greedy choice of components by brute force, one number at a time; cosines are compared exactly, as fractions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor

TIE = 1e-12


def sums(dots: Tensor, own: Tensor, other: Tensor, subset: Sequence[int], query: int, column: int) -> list[Fraction]:
    """D, δ(q, q) and δ(j, j) over a subset."""
    return [
        sum((Fraction(float(dots[c, query, column])) for c in subset), Fraction(0)),
        sum((Fraction(float(own[c, query])) for c in subset), Fraction(0)),
        sum((Fraction(float(other[c, query, column])) for c in subset), Fraction(0)),
    ]


def cosine(dot: Fraction, own: Fraction, other: Fraction, eps: float = 0.0) -> float:
    if own == 0 or other == 0:
        return 0.0
    return float(dot) / (math.sqrt(own) * math.sqrt(other) + eps)


def signed_square(dot: Fraction, own: Fraction, other: Fraction) -> Fraction:
    """sign(cos) cos²."""
    return Fraction(0) if own == 0 or other == 0 else dot * abs(dot) / (own * other)


def correlation(left: list[float], right: list[float]) -> float:
    deviations = []
    for values in (left, right):
        mean = math.fsum(values) / len(values)
        deviations.append([value - mean for value in values])
    lengths = [math.sqrt(math.fsum(d * d for d in part)) for part in deviations]
    constant = [length <= TIE for length in lengths]
    if any(constant):
        return float(all(constant))
    return math.fsum(a * b for a, b in zip(*deviations, strict=True)) / (lengths[0] * lengths[1])


def objective(
    kind: str,
    dots: Tensor,
    own: Tensor,
    other: Tensor,
    target: Tensor,
    valid: Tensor,
    subset: Sequence[int],
    eps: float = 0.0,
) -> float:
    """Mean over queries, from scratch."""
    c, q, k = dots.shape
    values: list[Fraction | float] = []
    for query in range(q):
        columns = [j for j in range(k) if valid[query, j]]
        if kind == "similarity":
            pair = [
                [cosine(*sums(dots, own, other, part, query, j), eps) for j in columns] for part in (subset, range(c))
            ]
            values.append(correlation(*pair))
            continue
        scores: dict[int, Fraction | float] = {}
        for j in columns:
            parts = sums(dots, own, other, subset, query, j)
            scores[j] = cosine(*parts, eps) if eps else signed_square(*parts)
        source = int(target[query])
        above = sum(scores[j] >= scores[source] for j in columns if j != source)
        values.append(Fraction(above == 0) if kind == "accuracy" else Fraction(1, 1 + above))
    return float(sum(values, Fraction(0)) / q) if kind != "similarity" else math.fsum(map(float, values)) / q


def greedy(
    kind: str,
    dots: Tensor,
    own: Tensor,
    other: Tensor,
    target: Tensor,
    valid: Tensor,
    forward: bool,
    eps: float = 0.0,
) -> tuple[list[int], list[float]]:
    """Algorithm 2 and its reverse by trying every component at every step; the first one among equally good ones."""
    c = len(dots)
    chosen: list[int] = []
    scores: list[float] = []
    for _ in range(c if forward else c - 1):
        tried = {}
        for candidate in (row for row in range(c) if row not in chosen):
            changed = [*chosen, candidate]
            subset = changed if forward else [row for row in range(c) if row not in changed]
            tried[candidate] = objective(kind, dots, own, other, target, valid, subset, eps)
        best = max(tried.values())
        chosen.append(min(row for row, score in tried.items() if score >= best - TIE))
        scores.append(tried[chosen[-1]])
    return chosen, scores
