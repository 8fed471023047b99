"""What came of choosing a setting by target examples that the selection has not looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FOLDS = 5  # parts of the targets by default


@dataclass(frozen=True, eq=False)
class HeldOutChoice:
    """How much of the loss of held-out target examples selections explain, by candidate and by number of picks.

    A step of the parameters moves target t by x_t along its own gradient, and its loss by −x_t + ½ x_t² with the
    empirical Fisher as curvature. The explained share is the mean of 1 − (1 − x_t)² over target examples that were not
    among those the rows were selected by: 0 where nothing is done to them, 1 at most, below 0 where they are harmed.

    Attributes:
        candidates: What was tried: ridges, weights, or names of pools.
        explained: [number of candidates, k], float64: after each of the k picks. Where a line is flat, rows do nothing;
            where it falls, they overshoot.
    """

    candidates: tuple[Any, ...]
    explained: Tensor

    @property
    def best(self) -> Any:
        """The candidate that explains most with all picks."""
        return self.candidates[int(self.explained[:, -1].argmax())]

    @property
    def curve(self) -> Tensor:
        """What the best candidate explains after each pick, [k]."""
        return self.explained[int(self.explained[:, -1].argmax())]

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain Python, ready for JSON."""
        return {"candidates": list(self.candidates), "explained": self.explained.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeldOutChoice:
        """The inverse of `to_dict`."""
        return cls(tuple(values["candidates"]), torch.tensor(values["explained"], dtype=torch.float64))


def check_folds(shown: str, folds: int, targets: int) -> None:
    """Refuses parts that so many targets do not have.

    Args:
        shown: How the caller's code reads, for the error text.
        folds: Number of parts, each of which is held out once.
        targets: Number of target examples that count.

    Raises:
        ValueError: If it is not an int from 2 to the number of targets.
    """
    if isinstance(folds, bool) or not isinstance(folds, int) or not 2 <= folds <= targets:
        raise ValueError(
            f"`{shown}`: expected an int from 2 to the number of targets, {targets}, of which each is held out once. "
            "Pass fewer folds or more target examples."
        )
