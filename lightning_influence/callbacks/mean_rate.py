"""The mean learning rate of the steps between two recordings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class MeanRate:
    """Averages the learning rate of some parameters over steps.

    The rate of a step is the mean by number of parameters over those that the optimizer holds, by identity; a step of
    an optimizer that holds none of them does not count.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0
        self._sizes: dict[int, int] = {}

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Whose rates count."""
        self._sizes = {id(parameter): parameter.numel() for parameter in parameters}

    def note(self, optimizer: Optimizer) -> None:
        """A step is about to be taken."""
        rates = [
            (float(group["lr"]), sum(self._sizes.get(id(parameter), 0) for parameter in group["params"]))
            for group in optimizer.param_groups
        ]
        held = [(rate, size) for rate, size in rates if size]
        if held:
            same = len({rate for rate, _ in held}) == 1
            self.total += held[0][0] if same else sum(r * n for r, n in held) / sum(n for _, n in held)
            self.count += 1

    @property
    def mean(self) -> float | None:
        """Of the steps since the last `clear`; None without any."""
        return self.total / self.count if self.count else None

    def clear(self) -> None:
        """Begin anew."""
        self.total, self.count = 0.0, 0

    def state(self) -> dict[str, Any]:
        """As JSON, for a run that goes on."""
        return {"total": self.total, "count": self.count}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.total, self.count = float(state["total"]), int(state["count"])
