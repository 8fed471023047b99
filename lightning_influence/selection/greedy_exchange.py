"""How the processes that share a pool talk about a greedy choice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Exchange(ABC):
    """All ranks make the same calls in the same order.

    Attributes:
        offset: Position of this rank's first row in the whole pool.
        most_rows: Whose features it should be asked to bring together at a time.
    """

    most_rows: ClassVar[int] = 1024
    offset: int

    @abstractmethod
    def gather(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all ranks, in the order of ranks; n may differ, also be 0."""

    @abstractmethod
    def agree(self, decision: Tensor) -> Tensor:
        """The decision of rank 0, of the same shape on every rank."""


class Alone(Exchange):
    """One process that holds the whole pool."""

    most_rows: ClassVar[int] = 4096
    offset = 0

    def gather(self, rows: Tensor) -> Tensor:
        """The rows themselves."""
        return rows

    def agree(self, decision: Tensor) -> Tensor:
        """The decision itself."""
        return decision
