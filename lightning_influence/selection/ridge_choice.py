"""Ridges of the Newton step, and how well each predicts the targets from random rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

RIDGES = tuple(10 ** (k / 4) for k in range(-8, 5))  # 0.01 to 10, four to a decade
NEARLY = 0.9  # of what the best ridge explains counts as no less
NEARLY_SCREENED = 0.95  # the same where rows that the others contradict are gone


@dataclass(frozen=True, eq=False)
class RidgeChoice:
    """How well random rows predict the targets, by ridge.

    Attributes:
        ridges: Tried, ascending; as `NewtonGreedy` takes them.
        errors: Mean over draws of ‖1 − Φ_t w‖² / m, [number of ridges]; 1 is what no row at all gives.
    """

    ridges: tuple[float, ...]
    errors: Tensor

    @property
    def best(self) -> float:
        """The largest ridge that explains at least 0.9 of what the best one does."""
        return self.nearly(NEARLY)

    def nearly(self, share: float) -> float:
        """The largest ridge that explains at least this share of what the best one does; 1 − error is what it explains.

        The curve is flat towards small ridges, down to rows that are fitted to the last bit; but networks trained on
        wrong labels do not gain by that. Where little is lost, the larger ridge is the safer one.
        """
        explained = 1 - self.errors
        most = explained.max()
        return self.ridges[int((explained >= most - (1 - share) * most.abs()).nonzero()[-1])]
