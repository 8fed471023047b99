"""The control group with as many rows of each source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from lightning_influence.estimators.factors import Factors, Id
from lightning_influence.selection.base import SelectionRule
from lightning_influence.selection.row_data import places

Sources: TypeAlias = Sequence[int | str] | Mapping[Id, int | str] | Callable[[Id], int | str]


@dataclass(frozen=True, eq=False)
class BalancedRandom(SelectionRule):
    """A draw without replacement in which the sources of the rows take turns; one that has no rows left drops out.

    The order of the sources and the draw within each depend on the seed alone, not on the order of the pool. Values and
    features only fill in the predicted gains.

    >>> rule = BalancedRandom(["web"] * 90 + ["books"] * 10)
    >>> sorted(row < 90 for row in rule.select(torch.zeros(100), budget=8).ids).count(True)
    4

    Attributes:
        sources: Source of each row: a sequence by position, or a mapping or function by id.
        seed: Seed of the draw, 0 <= seed < 2⁶³; the global generator is left alone.

    Raises:
        ValueError: If the seed is not such an int; from `select`, if a row of the pool has no source.
    """

    sources: Sources = field(repr=False)
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"`BalancedRandom(seed={self.seed!r})`: expected an int with 0 <= seed < 2**63.")
        sources: Any = self.sources
        if isinstance(sources, str) or not (callable(sources) or hasattr(sources, "__getitem__")):
            raise ValueError(
                f"`BalancedRandom(sources={type(self.sources).__name__})`: expected a source for each row, in a "
                "sequence by position, or a mapping or function by id."
            )

    def _pick(self, pool: Factors, budget: int) -> Sequence[int]:
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.randperm(len(pool), generator=generator)
        rows: list[int] = pool.id_ranks.cpu().argsort()[draw].tolist()
        queues: dict[int | str, list[int]] = {}
        for row, source in zip(rows, self._sources_of([pool.ids[row] for row in rows]), strict=True):
            queues.setdefault(source, []).append(row)
        turns = sorted(
            (place, order, row) for order, queue in enumerate(queues.values()) for place, row in enumerate(queue)
        )
        return [row for _, _, row in turns[:budget]]

    def _sources_of(self, names: Sequence[Id]) -> list[int | str]:
        sources: Any = self.sources
        if callable(sources):
            return [sources(name) for name in names]
        listed = sources.tolist() if hasattr(sources, "tolist") else sources
        places(f"{self!r}.select", names, list(listed) if isinstance(listed, Mapping) else range(len(listed)))
        return [listed[name] for name in names]
