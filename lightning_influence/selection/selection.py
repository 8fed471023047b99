"""What a selection rule returns: which rows, in which order, and what each is predicted to do."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Id
from lightning_influence.selection.held_out_choice import HeldOutChoice

_TENSORS = ("gains", "first_order", "interaction")
_TUPLES = ("ids", "positions")

Row = Mapping[str, Any]


class Rows(Protocol):
    """A list of rows, or a data set whose items are rows."""

    def __getitem__(self, position: int, /) -> Any:
        """The row at a row number."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows chosen from a pool, in the order in which they were picked.

    The gain of a pick is the predicted change of the target loss that it adds to that of the picks before it
    ([IA] section 3.2, eq. 12); a negative gain lowers the target loss. The first picks of a larger budget are the
    picks of a smaller one.

    Attributes:
        ids: Ids [k] of the picks.
        positions: Their row numbers [k] in the pool.
        gains: first_order + interaction [k], float64.
        first_order: −b_j [k], float64; for `NewtonGreedy` the part linear in the step that the pick causes.
        interaction: ⟨U_S, w_j⟩ + ½ K_jj [k], float64; 0 when no features were given; for `NewtonGreedy` the
            quadratic part.
        budget: k.
        objective: Sum of the gains: the predicted change of the target loss when all k are added.
        rule: The rule that chose, with its settings.
        pool_size: Rows that there were to choose from.
        lower_bound: No k rows of this pool have a lower objective; None when not certified.
        weight: Weight of one added row in the training objective, which values and features contained; None when the
            rule was given plain numbers.
        screened: Rows beside those of the pool size that were left out beforehand, as the others contradict them
            (`NewtonPool.select`).
        held_out: How the ridge or the weight was chosen by held-out targets, where it was.
    """

    ids: tuple[Id, ...]
    positions: tuple[int, ...]
    gains: Tensor
    first_order: Tensor
    interaction: Tensor
    budget: int
    objective: float
    rule: str
    pool_size: int
    lower_bound: float | None = None
    weight: float | None = None
    screened: int = 0
    held_out: HeldOutChoice | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def optimality_gap(self) -> float | None:
        """How much lower than the objective that of the best choice of k rows can be at most; None if not certified."""
        return None if self.lower_bound is None else self.objective - self.lower_bound

    def certified(self, lower_bound: float | None) -> Selection:
        """The same with a lower bound, cut off at the objective."""
        bound = lower_bound if lower_bound is None else min(lower_bound, self.objective)
        return replace(self, lower_bound=bound)

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain Python, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in _TENSORS:
            values[name] = values[name].tolist()
        for name in _TUPLES:
            values[name] = list(values[name])
        values["held_out"] = None if self.held_out is None else self.held_out.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Selection:
        """The inverse of `to_dict`; of earlier versions too, which knew of no ``screened`` and ``held_out``.

        Raises:
            ValueError: If a field is missing or unknown.
        """
        known, values = {field.name for field in fields(cls)}, {"screened": 0, "held_out": None, **values}
        if set(values) != known:
            wrong = sorted(known ^ set(values))
            raise ValueError(
                f"`Selection.from_dict`: expected the fields that `to_dict` writes. Missing or unknown: "
                f"{', '.join(wrong)}."
            )
        tensors = {name: torch.tensor(values[name], dtype=torch.float64) for name in _TENSORS}
        tuples = {name: tuple(values[name]) for name in _TUPLES}
        choice = None if values["held_out"] is None else HeldOutChoice.from_dict(values["held_out"])
        return cls(**{**values, **tensors, **tuples, "held_out": choice})

    def to_jsonl(self, path: str | os.PathLike[str], rows: Rows | Callable[[Id], Row] | None = None) -> Path:
        """Writes one JSON line per pick, in pick order: id, rank, gain, first_order, interaction, the row's fields.

        The file appears whole or not at all. A field of a row that has one of our five names is written with the
        prefix ``row_``; tensors and arrays are written as lists, NaN as null.

        Args:
            path: File to write; missing folders are made.
            rows: The pool, indexed by row number, or a function from id to row; each row a mapping.

        Returns:
            The path.

        Raises:
            ValueError: If a row is not a mapping or holds a value that JSON has no form for.
        """
        path = Path(path)
        text = "".join(f"{line}\n" for line in self._lines(rows))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path

    def _lines(self, rows: Rows | Callable[[Id], Row] | None) -> Iterator[str]:
        parts = zip(self.gains.tolist(), self.first_order.tolist(), self.interaction.tolist(), strict=True)
        for rank, (name, position, (gain, first, interaction)) in enumerate(
            zip(self.ids, self.positions, parts, strict=True)
        ):
            line = {"id": name, "rank": rank, "gain": gain, "first_order": first, "interaction": interaction}
            if rows is not None:
                row = rows(name) if callable(rows) else rows[position]
                _add_fields(line, row, name)
            yield json.dumps(line, ensure_ascii=False, allow_nan=False)


def _add_fields(line: dict[str, Any], row: Row, name: Id) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(
            f"`Selection.to_jsonl(rows)`: expected a mapping for each row. Row of id {name!r} is a "
            f"{type(row).__name__}; pass a function from id to a dict."
        )
    ours = set(line)
    for field, value in row.items():
        key = str(field)
        while key in ours or (key != field and key in row):
            key = f"row_{key}"
        line[key] = _plain(value, f"field {field!r} of id {name!r}")


def _plain(value: Any, where: str) -> Any:
    """A value as JSON has it."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(
        f"`Selection.to_jsonl(rows)`: expected values that JSON can hold. {where} is a {type(value).__name__}; "
        "pass a function from id to a dict without it."
    )
