"""Targets take turns: each takes its best row that is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors, Id, check_finite, check_ids
from lightning_influence.estimators.scores import Scores
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.filling_rule import FillingRule
from lightning_influence.selection.row_data import places

_PIECE = 1024


@dataclass(frozen=True, eq=False)
class RoundRobin(FillingRule):
    """The targets take turns, in the order in which they are given, and each takes its best row that nobody has.

    As RDS+ chooses (Ivison et al. 2025): over the queries of one task with the scores of an estimator as they are, over
    tasks with those of `target_scores`. Every target gets its share of the budget, however small its scores; equal
    scores go by id. Values and features only fill in the predicted gains.

    >>> scores = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.9, 0.2, 0.3, 0.0]])
    >>> RoundRobin(scores).select(scores.mean(0), budget=3).ids
    (0, 2, 1)

    Attributes:
        scores: [g, n] of g targets: `Scores`, whose training ids name the rows, or a tensor.
        ids: Ids of the columns of a tensor; None for positions.

    Raises:
        ValueError: If the scores are not [g, n] or not finite (ids are named), ids do not fit, or, from `select`, a
            row of the pool has no scores.
    """

    scores: Scores | Tensor = field(repr=False)
    ids: Sequence[Id] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        table = self._table
        if table.dim() != 2 or 0 in table.shape or table.is_complex():
            raise ValueError(f"`RoundRobin(scores)`: expected [g, n], got shape {list(table.shape)}.")
        if isinstance(self.scores, Scores) and self.ids is not None:
            raise ValueError("`RoundRobin(ids=...)`: the scores have ids already. Expected ids with a tensor only.")
        check_finite("RoundRobin", "scores", table.isfinite().all(0), self._names)

    @property
    def _table(self) -> Tensor:
        table = self.scores.total() if isinstance(self.scores, Scores) else torch.as_tensor(self.scores)
        return table.detach().cpu()

    @property
    def _names(self) -> tuple[Id, ...]:
        known = self.scores.train_ids if isinstance(self.scores, Scores) else self.ids
        return check_ids("RoundRobin", known, self._table.shape[1])

    @property
    def known_rows(self) -> int:
        """Those of a table of scores without ids."""
        return 0 if isinstance(self.scores, Scores) or self.ids is not None else self._table.shape[1]

    def __repr__(self) -> str:
        return f"RoundRobin({len(self._table)} targets)"

    def _fill(self, pool: Factors, admission: Admission) -> None:
        by_id = pool.id_ranks.argsort()
        columns = places(f"{self!r}.select", pool.ids, self._names)
        table = admission.per_cost(self._table[:, columns].to(by_id.device))
        orders = by_id[table[:, by_id].argsort(dim=1, descending=True, stable=True)]
        queues = [_rows(order) for order in orders]
        admission.take_first()
        turn = 0
        while admission.more:
            turn += admission.take(next(row for row in queues[turn % len(queues)] if admission.is_open(row)))


def _rows(order: Tensor) -> Iterator[int]:
    """Its numbers, as few at a time as are asked for: a list of all would be many times as large."""
    for part in order.split(_PIECE):  # type: ignore[no-untyped-call]
        yield from part.tolist()
