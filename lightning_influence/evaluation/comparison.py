"""Selections and score tables side by side: overlap, order, composition, cost, and what training on them gives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Id, check_ids, few
from lightning_influence.estimators.scores import Scores
from lightning_influence.evaluation.retraining import plain_ids
from lightning_influence.evaluation.text_table import aligned, number
from lightning_influence.metrics.class_entropy import class_entropy
from lightning_influence.metrics.intervals import Interval, student_interval
from lightning_influence.metrics.rank_agreement import spearman
from lightning_influence.selection.selection import Selection

_CALL = "compare"


@dataclass(frozen=True)
class ComparisonLine:
    """One selection.

    Attributes:
        name: Of the method.
        size: Number of rows.
        sources: Share of the rows from each source; empty without sources.
        classes: Share of each class; empty without classes.
        class_entropy: Of the classes, in nats; None without classes.
        cost: Sum of the costs of the rows, such as tokens; None without costs.
        seconds: What the choice took, if given.
        losses: Target loss after training on it, one for each seed; empty if not given.
        loss: Their mean.
        loss_interval: Its 95 % interval by Student's t; infinite for one seed.
    """

    name: str
    size: int
    sources: Mapping[Hashable, float]
    classes: Mapping[Hashable, float]
    class_entropy: float | None
    cost: float | None
    seconds: float | None
    losses: tuple[float, ...]
    loss: float | None
    loss_interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """Flat: shares as ``source: name`` and ``class: name``, the interval as two numbers."""
        keys = ("name", "size", "class_entropy", "cost", "seconds", "loss")
        row: dict[str, Any] = {key: getattr(self, key) for key in keys}
        row["loss_low"], row["loss_high"] = self.loss_interval or (None, None)
        for label, shares in (("source", self.sources), ("class", self.classes)):
            row |= {f"{label}: {key}": share for key, share in shares.items()}
        return row


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found; printed, it is `table`.

    Attributes:
        lines: One for each selection, in their order.
        overlap: Jaccard index of every two selections, |A ∩ B| / |A ∪ B|, float64 [k, k].
        scored: Names of the score tables.
        rank_correlation: Spearman's over the pool of every two score tables, float64 [s, s].
    """

    lines: tuple[ComparisonLine, ...]
    overlap: Tensor
    scored: tuple[str, ...]
    rank_correlation: Tensor

    def __str__(self) -> str:
        return self.table()

    def line(self, name: str) -> ComparisonLine:
        """The line of one selection.

        Raises:
            ValueError: If there is none of that name.
        """
        found = {line.name: line for line in self.lines}
        if name not in found:
            raise ValueError(f"`Comparison.line({name!r})`: expected one of {list(found)}.")
        return found[name]

    def rows(self) -> list[dict[str, Any]]:
        """Every line as a flat dict, as a data frame takes them."""
        return [line.to_dict() for line in self.lines]

    def table(self) -> str:
        """Tables of text: the selections with what is known of them, their overlap, and the orders of the scores."""
        parts = [_line_table(self.lines)] if self.lines else []
        if len(self.lines) > 1:
            parts.append(_square("overlap (Jaccard)", [line.name for line in self.lines], self.overlap))
        if len(self.scored) > 1:
            parts.append(_square("rank correlation (Spearman)", self.scored, self.rank_correlation))
        return "\n\n".join(parts)


def compare(
    selections: Mapping[str, Selection | Iterable[Id]],
    scores: Mapping[str, Scores | Tensor] | None = None,
    *,
    sources: Mapping[Id, Hashable] | Sequence[Hashable] | None = None,
    classes: Mapping[Id, Hashable] | Sequence[Hashable] | None = None,
    costs: Mapping[Id, float] | Sequence[float] | None = None,
    seconds: Mapping[str, float] | None = None,
    losses: Mapping[str, Sequence[float]] | None = None,
) -> Comparison:
    """How selections of one pool differ, and what they are worth.

    Args:
        selections: By name; ids, or what a selection rule returned.
        scores: Score tables of one pool by name: `Scores`, whose mean over the queries counts, or values [n].
        sources: Source of each row, by id, or in the order of the pool when ids are row numbers.
        classes: Class of each row, likewise.
        costs: Cost of each row, such as its tokens, likewise.
        seconds: What the choice took, by name of the selection.
        losses: Target losses after training on a selection, one for each seed, by name.

    Raises:
        ValueError: If there is nothing to compare, ids repeat or have no source, class or cost (they are named), score
            tables are of different pools, a name in ``seconds`` or ``losses`` is of no selection, or a loss is not
            finite.

    >>> found = compare({"a": [0, 1], "b": [1, 2]}, classes=["x", "y", "y"], losses={"a": [0.5, 0.7]})
    >>> found.overlap[0, 1].item(), found.line("b").class_entropy, found.line("a").loss
    (0.3333333333333333, 0.0, 0.6)
    """
    tables = _score_rows({} if scores is None else scores)
    chosen = {name: _ids(name, given) for name, given in selections.items()}
    if not chosen and not tables:
        raise ValueError(f"`{_CALL}`: expected selections or scores.")
    for argument, given in (("seconds", seconds), ("losses", losses)):
        odd = [name for name in given or {} if name not in chosen]
        if odd:
            raise ValueError(f"`{_CALL}({argument})`: {odd} are no selections; expected names among {list(chosen)}.")
    for name, own in (losses or {}).items():
        if not isinstance(own, Iterable):
            raise ValueError(f"`{_CALL}(losses)`: {name!r} has {own!r}; expected a list of losses, one for each seed.")
        if not all(map(math.isfinite, own)):
            raise ValueError(
                f"`{_CALL}(losses)`: {name!r} has {list(own)}; expected finite losses. Leave diverged seeds out."
            )
    lines = []
    for name, ids in chosen.items():
        origins, kinds = _labels("sources", sources, ids), _labels("classes", classes, ids)
        spent = None if costs is None else float(sum(_labels("costs", costs, ids)))
        lines.append(_line(name, origins, kinds, spent, len(ids), seconds or {}, losses or {}))
    members = [set(ids) for ids in chosen.values()]
    overlap = torch.tensor([[len(a & b) / len(a | b) for b in members] for a in members], dtype=torch.float64)
    return Comparison(tuple(lines), overlap, tuple(tables), _correlations(list(tables.values())))


def _line(
    name: str,
    sources: list[Any],
    classes: list[Any],
    cost: float | None,
    size: int,
    seconds: Mapping[str, float],
    losses: Mapping[str, Sequence[float]],
) -> ComparisonLine:
    numbers = {key: k for k, key in enumerate(dict.fromkeys(classes))}
    entropy = float(class_entropy(torch.tensor([numbers[key] for key in classes]))) if classes else None
    values = torch.tensor(list(losses.get(name, ())), dtype=torch.float64)
    return ComparisonLine(
        name=name,
        size=size,
        sources=_shares(sources),
        classes=_shares(classes),
        class_entropy=entropy,
        cost=cost,
        seconds=seconds.get(name),
        losses=tuple(values.tolist()),
        loss=float(values.mean()) if len(values) else None,
        loss_interval=student_interval(values) if len(values) else None,
    )


def _shares(labels: list[Any]) -> dict[Hashable, float]:
    """Of each label, the most frequent first."""
    return {key: times / len(labels) for key, times in Counter(labels).most_common()}


def _ids(name: str, given: Selection | Iterable[Id]) -> tuple[Id, ...]:
    ids = given.ids if isinstance(given, Selection) else plain_ids(given)
    if not ids:
        raise ValueError(f"`{_CALL}(selections)`: {name!r} is empty; expected at least one row.")
    return check_ids(f"{_CALL}(selections), {name!r}", ids, len(ids))


def _labels(argument: str, given: Mapping[Id, Any] | Sequence[Any] | None, ids: tuple[Id, ...]) -> list[Any]:
    if given is None:
        return []
    known: Mapping[Id, Any] = given if isinstance(given, Mapping) else dict(enumerate(given))
    away = [name for name in ids if name not in known]
    if away:
        raise ValueError(f"`{_CALL}({argument})`: expected one for every row that was chosen, none for {few(away)}.")
    plain = (known[name] for name in ids)
    return [value.item() if isinstance(value, Tensor) else value for value in plain]


def _score_rows(scores: Mapping[str, Scores | Tensor]) -> dict[str, Tensor]:
    """Values [n] by name."""
    found = {name: s.total().double().mean(0) if isinstance(s, Scores) else s.double() for name, s in scores.items()}
    shapes = {name: list(values.shape) for name, values in found.items()}
    pools = {s.train_ids for s in scores.values() if isinstance(s, Scores)}
    if len(pools) > 1 or any(len(shape) != 1 or shape != next(iter(shapes.values())) for shape in shapes.values()):
        raise ValueError(f"`{_CALL}(scores)`: expected values [n] or Scores of one pool, in one order. Got {shapes}.")
    return {name: values.cpu() for name, values in found.items()}


def _correlations(tables: list[Tensor]) -> Tensor:
    if not tables:
        return torch.empty(0, 0, dtype=torch.float64)
    rows = torch.stack(tables)
    return torch.stack([spearman(row.expand_as(rows), rows) for row in rows])


def _line_table(lines: Sequence[ComparisonLine]) -> str:
    columns = {
        "class entropy": [number(line.class_entropy) for line in lines],
        "sources": [", ".join(f"{key} {100 * share:.0f} %" for key, share in line.sources.items()) for line in lines],
        "cost": ["" if line.cost is None else f"{line.cost:g}" for line in lines],
        "seconds": ["" if line.seconds is None else f"{line.seconds:.3g}" for line in lines],
        "target loss": [number(line.loss, line.loss_interval) for line in lines],
    }
    known = {head: cells for head, cells in columns.items() if set(cells) - {"", "-"}}
    body = [[line.name, str(line.size), *cells] for line, *cells in zip(lines, *known.values(), strict=True)]
    return aligned([["selection", "rows", *known], *body])


def _square(title: str, names: Sequence[str], values: Tensor) -> str:
    body = [[name, *map(number, row)] for name, row in zip(names, values.tolist(), strict=True)]
    return aligned([[title, *names], *body])
