"""Random labels that depend on the example and the seed alone, and cheap draws from large vocabularies."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.capture.budget import at_once

BLOCK = 64  # width of the second of the two stages of a draw
PIECE = 1 << 19  # logits that are worked on at a time: they stay in the cache, which is five times as fast


class Uniforms:
    """Counter-based uniform numbers: the same for an example id, whatever batch, order or device it is in.

    Args:
        ids: Ids of the examples of a batch, int64 [n].
        seed: Any integer.
    """

    def __init__(self, ids: Tensor, seed: int) -> None:
        self.ids = ids.cpu()
        self.seed = seed

    def __call__(self, counters: Tensor) -> Tensor:
        """Numbers in (0, 1), float64 with the shape of ``counters`` [n, ...], on the CPU."""
        ids = self.ids.numpy().astype(np.uint64).reshape(-1, *[1] * (counters.dim() - 1))
        start = np.full(1, self.seed % 2**64, dtype=np.uint64)
        state = _scramble(_scramble(_scramble(start) ^ ids) ^ counters.cpu().numpy().astype(np.uint64))
        # 53 bits centred in their cells, so that neither 0 nor 1 can come out.
        numbers = (state >> np.uint64(11)).astype(np.float64, order="C") * 2.0**-53 + 2.0**-54
        return torch.from_numpy(numbers)


def _scramble(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The SplitMix64 output function (Steele, Lea, Flood 2014); arithmetic is modulo 2^64."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def sample_categories(logits: Tensor, draws: Tensor) -> Tensor:
    """Draw one category per row from softmax(logits) by inverting the distribution function.

    The cumulative sum runs over blocks of the vocabulary first and inside one block then: for V = 8000 that
    is several times cheaper than a cumulative sum over V, and much cheaper than torch.multinomial.

    Args:
        logits: [p, V].
        draws: Uniform numbers, [p].

    Returns:
        int64 [p].
    """
    step = max(1, at_once(PIECE, logits.device) // logits.shape[1])
    parts = zip(logits.split(step), draws.split(step), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([_sample(rows, numbers) for rows, numbers in parts])


def _sample(logits: Tensor, draws: Tensor) -> Tensor:
    p, v = logits.shape
    logits = logits if logits.dtype == torch.float64 else logits.float()
    weights = torch.exp(logits - logits.amax(dim=1, keepdim=True))
    if v <= 2 * BLOCK:
        return _invert(weights.double(), draws)[0]
    weights = F.pad(weights, (0, -v % BLOCK)).reshape(p, -1, BLOCK)
    block, rest = _invert(weights.sum(2).double(), draws)
    inside = weights[torch.arange(p, device=weights.device), block].double()
    return block * BLOCK + _invert(inside, rest)[0]


def _invert(weights: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The cell of positive weight that each draw falls into, and how far into it, as a part of 1."""
    edges = weights.cumsum(1)
    point = draws.to(edges).clamp(0, 1 - 2.0**-53).unsqueeze(1) * edges[:, -1:]  # below the last edge, also rounded
    cell = torch.searchsorted(edges, point, right=True).clamp_max(weights.shape[1] - 1)  # NaN sorts last
    width = weights.gather(1, cell)
    return cell.squeeze(1), ((point - edges.gather(1, cell) + width) / width).squeeze(1)
