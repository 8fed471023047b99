"""Greedy choice of components against Algorithm 2 of the paper in plain Python, on the same products.

    python examples/benchmarks/component_greedy.py [--quick] [--components 211] [--queries 1000] [--repeats 3]

Made-up gradients of low rank: the candidates of a query share a topic, the query is its source seen through noise
that differs by component and by query, and components differ in length, so that no component is right for all queries
and the full gradient is not the best. All walk the whole path by accuracy, in turns; medians are printed. The plain
version keeps running sums and compares the cosine of the source with the highest of the others, as the description
reads (`speedup_plain`); the other one, `speedup_plain_early`, leaves a query at the first candidate that is not below
the source. Nested lists are built outside the timing, as our tensors are. Every run is complete, nothing is
extrapolated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from math import sqrt
from typing import Any

import torch

from lightning_influence.selection import ComponentPairs, cross_validate_components, greedy_components

RANK = 6


def made_up(c: int, q: int, k: int, seed: int = 0) -> ComponentPairs:
    """Products of c components, q queries and k candidates, float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    length = normal(c, 1, 1).mul(1.5).exp()
    topic = normal(c, q, RANK)
    candidates = length[..., None] * (topic[:, :, None] + normal(c, q, k, RANK))
    target = torch.randint(k, (q,), generator=generator)
    noise = 4 * normal(c, 1, 1).mul(0.5).exp() * normal(1, q, 1).mul(0.8).exp()
    queries = candidates[:, torch.arange(q), target] + length * noise * normal(c, q, RANK)
    return ComponentPairs(
        components=tuple(f"layers.{row}" for row in range(c)),
        sizes=(1,) * c,
        dots=torch.einsum("cqr,cqkr->cqk", queries, candidates),
        query_squares=queries.square().sum(-1),
        candidate_squares=candidates.square().sum(-1),
        target=target,
    )


Lists = tuple[list[Any], list[Any], list[Any], list[int]]  # products, of queries, of candidates, sources


def plain(lists: Lists, count_hits: Callable[..., int]) -> tuple[list[int], list[float]]:
    """Algorithm 2: rows of the components in the order in which they are added, and the accuracy after each."""
    dots, own, other, target = lists
    number, width = len(target), len(dots[0][0])
    sum_dots = [[0.0] * width for _ in range(number)]
    sum_own, sum_other = [0.0] * number, [[0.0] * width for _ in range(number)]
    left, order, path = list(range(len(dots))), [], []
    while left:
        best, best_hits = left[0], -1
        for c in left:
            hits = count_hits(dots[c], own[c], other[c], sum_dots, sum_own, sum_other, target)
            if hits > best_hits:
                best, best_hits = c, hits
        for i in range(number):
            sum_own[i] += own[best][i]
            sum_dots[i] = [a + b for a, b in zip(sum_dots[i], dots[best][i], strict=True)]
            sum_other[i] = [a + b for a, b in zip(sum_other[i], other[best][i], strict=True)]
        left.remove(best)
        order.append(best)
        path.append(best_hits / number)
    return order, path


def hits_by_highest(*parts: Any) -> int:
    """Queries whose source is above the highest of the others."""
    hits = 0
    for dot, length, square, done, done_own, done_square, source in zip(*parts, strict=True):
        scale = sqrt(done_own + length)
        cosines = [(a + b) / (scale * sqrt(x + y)) for a, b, x, y in zip(done, dot, done_square, square, strict=True)]
        score = cosines.pop(source)
        if score > max(cosines):
            hits += 1
    return hits


def hits_early(*parts: Any) -> int:
    """The same, leaving a query at the first candidate that is not below the source."""
    hits = 0
    for dot, length, square, done, done_own, done_square, source in zip(*parts, strict=True):
        scale = sqrt(done_own + length)
        score = (done[source] + dot[source]) / (scale * sqrt(done_square[source] + square[source]))
        for j in range(len(dot)):
            if j != source and (done[j] + dot[j]) / (scale * sqrt(done_square[j] + square[j])) >= score:
                break
        else:
            hits += 1
    return hits


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def others(pairs: ComponentPairs) -> dict[str, float]:
    """Seconds of the other ways to choose, once each."""
    works: dict[str, Callable[[], Any]] = {
        "mrr": lambda: greedy_components(pairs, "mrr", progress=False),
        "similarity": lambda: greedy_components(pairs, "similarity", progress=False),
        "backward": lambda: greedy_components(pairs, direction="backward", progress=False),
        "five splits": lambda: cross_validate_components(pairs, progress=False),
    }
    return {name: round(timed(work)[0], 2) for name, work in works.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 components x 200 queries, two rounds")
    parser.add_argument("--components", type=int, default=211)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.quick:
        args.components, args.queries, args.repeats = 40, 200, 2
    pairs = made_up(args.components, args.queries, args.candidates)
    parts = (pairs.dots, pairs.query_squares, pairs.candidate_squares, pairs.target)
    dots, own, other, target = (part.tolist() for part in parts)
    lists = (dots, own, other, target)
    greedy_components(made_up(5, 20, args.candidates), progress=False)  # warm-up
    works: dict[str, Callable[[], Any]] = {
        "ours": lambda: greedy_components(pairs, progress=False),
        "plain": lambda: plain(lists, hits_by_highest),
        "plain early": lambda: plain(lists, hits_early),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    found: dict[str, Any] = {}
    for turn in range(args.repeats):
        for name in works if turn % 2 == 0 else reversed(works):
            taken, found[name] = timed(works[name])
            seconds[name].append(taken)
        print({name: round(values[-1], 3) for name, values in seconds.items()}, flush=True)
    path = found["ours"]
    ours = ([pairs.components.index(name) for name in path.order], list(path.scores))
    print(f"accuracy: full {path.whole:.3f}, best {path.best.score:.3f} with {len(path.best)} of {args.components}")
    print("seconds of other choices:", others(pairs))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "seconds": round(median["ours"], 3),
        "speedup_plain": round(median["plain"] / median["ours"], 1),
        "speedup_plain_early": round(median["plain early"] / median["ours"], 1),
        "same_path": ours == found["plain"] == found["plain early"],
        "threads": torch.get_num_threads(),
    }
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
