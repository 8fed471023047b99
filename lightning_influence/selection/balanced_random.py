"""The control group with as many rows of each source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.constraints import Sources
from lightning_influence.selection.filling_rule import FillingRule
from lightning_influence.selection.row_data import by_position, of_rows


@dataclass(frozen=True, eq=False)
class BalancedRandom(FillingRule):
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

    weighs_costs: ClassVar[bool] = False

    @property
    def known_rows(self) -> int:
        """Those of a sequence of sources."""
        return by_position(self.sources)

    def _fill(self, pool: Factors, admission: Admission) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.randperm(len(pool), generator=generator)
        rows: list[int] = pool.id_ranks.cpu().argsort()[draw].tolist()
        queues: dict[int | str, list[int]] = {}
        sources = of_rows(f"{self!r}.select", [pool.ids[row] for row in rows], self.sources)
        for row, source in zip(rows, sources, strict=True):
            queues.setdefault(source, []).append(row)
        admission.take_first()
        turns = [iter(queue) for queue in queues.values()]
        while admission.more:
            for turn in turns:
                found = next((row for row in turn if admission.is_open(row)), None)
                if found is not None:
                    admission.take(found)
