"""Work on the processor side by side: each piece on one thread, which for many small products beats all on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """``work`` of each piece, in their order; as many at a time as torch has threads, each with one of them.

    A piece always runs with a single thread, so that its result does not depend on how many others there are. The
    caller's number of threads is as before when this returns.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, pieces))
    finally:
        torch.set_num_threads(threads)  # torch also notes it for threads to come, and the workers noted 1


def shares(sizes: Sequence[float], number: int) -> list[list[int]]:
    """Places of the sizes in at most ``number`` shares of about the same sum, none empty: largest first to the least.

    >>> shares([1, 5, 2, 3], 2)
    [[1, 0], [3, 2]]
    """
    found: list[list[int]] = [[] for _ in range(min(number, len(sizes)))]
    sums = [0.0] * len(found)
    for place in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        least = min(range(len(found)), key=sums.__getitem__)
        found[least].append(place)
        sums[least] += sizes[place]
    return found
