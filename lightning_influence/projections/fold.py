"""Adding up the coordinates of a vector in buckets, with random signs: the cheapest unbiased projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.projections.base import generator


@dataclass(frozen=True)
class Fold:
    """CountSketch (Charikar et al. 2002) of vectors [..., d] -> [..., b].

    Coordinates are taken in stretches of b; each stretch is turned by a random offset and added with random signs,
    so two coordinates of different stretches share a bucket with probability 1 / b and two of one stretch never do.
    That reads the vector once in order, where hashing each coordinate by itself would jump about. Buckets come out
    in random order. With b >= d nothing is added up: the coordinates are shuffled among zeros.

    Attributes:
        signs: [d], ones and minus ones.
        offsets: One for each stretch, in [0, b).
        order: Permutation of the buckets, int64 [b].
    """

    signs: Tensor
    offsets: tuple[int, ...]
    order: Tensor

    @classmethod
    def draw(cls, size: int, buckets: int, seed: int, device: torch.device | None = None) -> Fold:
        """A random fold of ``size`` coordinates; drawn on the CPU, then moved."""
        rng = generator(seed)
        stretches = -(-size // buckets)
        offsets = torch.randint(buckets, (stretches,), generator=rng) if stretches > 1 else torch.zeros(1).long()
        signs = random_signs(size, rng) if stretches > 1 else torch.ones(size)
        order = torch.randperm(buckets, generator=rng)
        return cls(signs.to(device), tuple(offsets.tolist()), order.to(device))

    @property
    def num_bytes(self) -> int:
        """Of the random numbers."""
        return self.signs.nbytes + self.order.nbytes

    def __call__(self, vectors: Tensor) -> Tensor:
        """[..., d] -> [..., b]."""
        flat = vectors.reshape(-1, len(self.signs))
        size, buckets = flat.shape[1], len(self.order)
        if size <= buckets:
            folded = F.pad(flat, (0, buckets - size))
        else:
            folded = flat.new_zeros(len(flat), buckets)
            signs = self.signs.to(flat.dtype)
            for offset, start in zip(self.offsets, range(0, size, buckets), strict=True):
                middle = min(size, start + buckets - offset)
                end = min(size, start + buckets)
                folded[:, offset : offset + middle - start].addcmul_(flat[:, start:middle], signs[start:middle])
                folded[:, : end - middle].addcmul_(flat[:, middle:end], signs[middle:end])
        return folded.index_select(1, self.order).reshape(*vectors.shape[:-1], buckets)

    def places(self) -> Tensor:
        """The bucket of each coordinate, int64 [d]."""
        size, buckets = len(self.signs), len(self.order)
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(buckets, device=self.order.device)
        coordinates = torch.arange(size, device=self.order.device)
        offsets = torch.tensor(self.offsets, device=self.order.device)
        return place[(coordinates + offsets[coordinates // buckets]) % buckets]


def random_signs(size: int, rng: torch.Generator) -> Tensor:
    """Independent ones and minus ones, float32 [size]."""
    return torch.randint(2, (size,), generator=rng, dtype=torch.int8).float().mul_(2).sub_(1)
