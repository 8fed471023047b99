"""Covariances from a part of the data, the same part whatever the batches, their order and the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_influence.capture.sampling import Uniforms

Unit: TypeAlias = Literal["examples", "tokens"]

APART = 0x5EED  # keeps these draws apart from those of labels, which count from the same seed


@dataclass(frozen=True)
class Subsample:
    """Every example, or every token (position) of an example, is in it with the same chance.

    What is in it depends on the example's id, the place of the token among the example's own ones and the seed alone.

    Attributes:
        share: The chance, in (0, 1].
        unit: ``"examples"`` or ``"tokens"``.
        seed: Of the draws.
    """

    share: float
    unit: Unit
    seed: int

    def examples(self, ids: Sequence[int]) -> list[int]:
        """Those of the ids of which something may be needed: all of them where tokens are drawn."""
        if self.unit == "tokens" or not len(ids):
            return list(ids)
        kept = self._draw(torch.tensor(ids), torch.zeros(len(ids), 1, dtype=torch.int64))[:, 0].tolist()
        return [k for k, take in zip(ids, kept, strict=True) if take]

    def positions(self, ids: Tensor, t: int, mask: Tensor | None) -> Tensor:
        """bool [n, t] on the CPU, within a mask of the positions that belong to an example."""
        inside = torch.ones(len(ids), t, dtype=torch.bool) if mask is None else mask.cpu()
        # Counted from an example's first own position, so that padding does not matter.
        places = inside.long().cumsum(1) if self.unit == "tokens" else torch.zeros(len(ids), 1, dtype=torch.int64)
        return inside & self._draw(ids, places)

    def _draw(self, ids: Tensor, counters: Tensor) -> Tensor:
        return Uniforms(ids, self.seed ^ APART)(counters) < self.share


def check_subsample(owner: str, share: float, unit: str) -> None:
    """Refuse what is no part of the data.

    Raises:
        ValueError: Unless the share is a number in (0, 1], and the unit known.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"`{owner}(covariance_share={share!r})`: expected a number in (0, 1]; 1.0 takes everything.")
    if unit not in get_args(Unit):
        raise ValueError(f"`{owner}(covariance_of={unit!r})`: expected 'examples' or 'tokens'.")
