"""Fact tracing: do scores find the training examples that state what a query asks ([MS] section 5)?"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence.estimators.candidates import CandidateScores
from lightning_influence.estimators.scores import Scores
from lightning_influence.metrics.intervals import Interval, bootstrap_interval
from lightning_influence.selection.component_cross_validation import group_numbers

Id: TypeAlias = int | str
Traced: TypeAlias = Scores | CandidateScores
BLOCK = 2**24  # scores that are ordered at a time


@dataclass(frozen=True)
class FactTracingLine:
    """What one estimator, or filter, finds.

    Attributes:
        name: Of the estimator; ``"chance"`` for a random order.
        measures: Mean over queries of ``mrr``, and of ``recall@k`` and ``hit@k`` for each k.
        intervals: 95 % confidence intervals of the same; empty for chance, which is exact.
    """

    name: str
    measures: Mapping[str, float]
    intervals: Mapping[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """Flat: an interval as two numbers, such as ``mrr_low`` and ``mrr_high``."""
        row: dict[str, Any] = {"name": self.name}
        for key, value in self.measures.items():
            row[key] = value
            row[f"{key}_low"], row[f"{key}_high"] = self.intervals.get(key, (None, None))
        return row


@dataclass(frozen=True)
class FactTracingReport:
    """What `evaluate_fact_tracing` found; printed, it is `table`.

    Attributes:
        lines: Chance, then the estimators in the order in which they were given.
        num_queries: Number of queries.
        num_train: Number of training examples that were searched.
    """

    lines: tuple[FactTracingLine, ...]
    num_queries: int
    num_train: int

    def __str__(self) -> str:
        return self.table()

    def line(self, name: str) -> FactTracingLine:
        """The line of one estimator.

        Raises:
            ValueError: If there is none of that name.
        """
        found = {line.name: line for line in self.lines}
        if name not in found:
            raise ValueError(f"`FactTracingReport.line({name!r})`: expected one of {list(found)}.")
        return found[name]

    def rows(self) -> list[dict[str, Any]]:
        """Every line as a flat dict, as a data frame takes them."""
        return [line.to_dict() for line in self.lines]

    def table(self) -> str:
        """A table of text."""
        head = ["estimator", *self.lines[0].measures]
        body = [[line.name, *(_measured(line, key) for key in line.measures)] for line in self.lines]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        padded = [" | ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *body)]
        return "\n".join([padded[0], "-|-".join("-" * width for width in widths), *padded[1:]])


def evaluate_fact_tracing(
    scores: Traced | Mapping[str, Traced],
    relevant: Mapping[Id, Iterable[Id]],
    *,
    at: Sequence[int] = (1, 10),
    groups: Mapping[Id, Hashable] | None = None,
    seed: int = 0,
) -> FactTracingReport:
    """MRR, Recall@k and Hit@k of the order into which scores bring the training examples of each query.

    MRR is the mean over queries of 1 over the place of the best relevant example; Recall@k the mean share of a query's
    relevant examples among the first k; Hit@k the share of queries with one of them there. Of equal scores relevant
    examples come last, so that a score that knows nothing is not at chance but below. With `CandidateScores` a relevant
    example that is no candidate is not found: its reciprocal place is 0, and it counts in the recall. A filter is
    measured as ``Lexical(filter, text).score(queries, train)``.

    Args:
        scores: Of an estimator, or of several by name, over the same queries and training examples.
        relevant: Ids of the relevant training examples of each query.
        at: The k's.
        groups: What each query belongs to, such as its fact: queries of a group are one case in the intervals, which
            draw groups again and again. None: each query by itself.
        seed: Of those draws.

    Raises:
        ValueError: If a query has no relevant training example, one is not among the examples that were scored, a score
            is NaN, or estimators differ in their queries (ids are named).

    >>> scores = Scores(torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.1]]), (0, 1), (0, 1, 2), "dot", "sum")
    >>> report = evaluate_fact_tracing(scores, {0: [2], 1: [1, 0]}, at=[1])
    >>> report.line("scores").measures
    {'mrr': 0.75, 'recall@1': 0.25, 'hit@1': 0.5}
    """
    named = dict(scores) if isinstance(scores, Mapping) else {"scores": scores}
    ids = _checked(named, relevant, at)
    wanted = {query: set(relevant[query]) for query in ids}
    members = group_numbers(_groups(groups, ids), len(ids), "evaluate_fact_tracing")
    numbers = torch.tensor([len(wanted[query]) for query in ids])
    n = _size(next(iter(named.values())))
    lines = [_chance(numbers, n, at)]
    for name, found in named.items():
        values = _measures(_places(name, found, wanted), numbers, at)
        spreads = bootstrap_interval(torch.stack(list(values.values())), members, seed)
        means = {key: float(value.mean()) for key, value in values.items()}
        lines.append(FactTracingLine(name, means, dict(zip(means, spreads, strict=True))))
    return FactTracingReport(tuple(lines), len(ids), n)


def _checked(named: Mapping[str, Any], relevant: Mapping[Id, Iterable[Id]], at: Sequence[int]) -> tuple[Id, ...]:
    """Ids of the queries, after everything was looked at."""
    call = "evaluate_fact_tracing"
    odd = {
        name: type(found).__name__ for name, found in named.items() if not isinstance(found, Scores | CandidateScores)
    }
    if odd or not named:
        raise ValueError(f"`{call}(scores)`: expected Scores or CandidateScores, at least one, got {odd}.")
    wrong = [k for k in at if isinstance(k, bool) or not isinstance(k, int) or k < 1]
    if wrong or not at:
        raise ValueError(f"`{call}(at={list(at)})`: expected ints >= 1.")
    first = next(iter(named.values()))
    ids: tuple[Id, ...] = first.query_ids
    others = [name for name, found in named.items() if found.query_ids != ids or _size(found) != _size(first)]
    if others:
        raise ValueError(f"`{call}(scores)`: {others} have other queries or training examples than the first.")
    lost = [query for query in ids if not list(relevant.get(query, ()))]
    if lost:
        raise ValueError(
            f"`{call}(relevant)`: {len(lost)} of {len(ids)} queries have no relevant training example (ids "
            f"{lost[:8]}). Leave them out: nothing can be found for them."
        )
    for name, found in named.items():
        known = set(found.train_ids) if isinstance(found, Scores) else None
        away = [query for query in ids if known is not None and not known.issuperset(relevant[query])]
        if away:
            raise ValueError(
                f"`{call}(relevant)`: relevant examples of {len(away)} queries (ids {away[:8]}) are not among the "
                f"{_size(found)} that {name!r} has scores of."
            )
    return ids


def _size(found: Traced) -> int:
    return len(found.train_ids) if isinstance(found, Scores) else found.num_train


def _groups(groups: Mapping[Id, Hashable] | None, ids: Sequence[Id]) -> list[Hashable] | None:
    if groups is None:
        return None
    without = [query for query in ids if query not in groups]
    if without:
        raise ValueError(f"`evaluate_fact_tracing(groups)`: expected one for every query, none for {without[:8]}.")
    return [groups[query] for query in ids]


def _places(name: str, found: Traced, wanted: Mapping[Id, set[Id]]) -> Tensor:
    """Which places hold a relevant example, bool [q, n], best score first and relevant ones last among equals."""
    values = found.total() if isinstance(found, Scores) else found.values
    unknown = [query for query, bad in zip(found.query_ids, values.isnan().any(1).tolist(), strict=True) if bad]
    if unknown:
        raise ValueError(
            f"`evaluate_fact_tracing(scores)`: {name!r} has NaN for queries {unknown[:8]}; expected numbers."
        )
    hits = torch.zeros(values.shape, dtype=torch.bool)
    column = {k: place for place, k in enumerate(found.train_ids)} if isinstance(found, Scores) else {}
    for row, query in enumerate(found.query_ids):
        if isinstance(found, Scores):
            hits[row, [column[k] for k in wanted[query]]] = True
        else:
            hits[row] = torch.tensor([k in wanted[query] for k in found.candidates[row]])
    step = max(1, BLOCK // values.shape[1])
    parts = zip(values.cpu().split(step), hits.split(step), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([_ordered(part, relevant) for part, relevant in parts])


def _ordered(values: Tensor, relevant: Tensor) -> Tensor:
    last = torch.argsort(relevant.int(), dim=1, stable=True)
    order = torch.argsort(values.gather(1, last), dim=1, descending=True, stable=True)
    return relevant.gather(1, last.gather(1, order))


def _measures(places: Tensor, numbers: Tensor, at: Sequence[int]) -> dict[str, Tensor]:
    """Of each query, float64 [q]."""
    first = torch.where(places.any(1), 1 / (1 + places.int().argmax(1).double()), 0)
    found = {k: places[:, :k].sum(1).double() for k in at}
    measures = {"mrr": first}
    for k, count in found.items():
        measures |= {f"recall@{k}": count / numbers, f"hit@{k}": (count > 0).double()}
    return measures


def _chance(numbers: Tensor, n: int, at: Sequence[int]) -> FactTracingLine:
    """What a random order of n examples, r of them relevant, is expected to reach."""
    left = torch.arange(n, 0, -1).double()  # not yet drawn before each place
    mrr, hit = torch.zeros(len(numbers)).double(), {k: torch.zeros(len(numbers)).double() for k in at}
    for r in sorted(set(numbers.tolist())):
        missed = torch.cat([torch.ones(1), (1 - r / left).clamp(min=0).cumprod(0)])  # none among the first 0, 1, ...
        mrr[numbers == r] = ((missed[:-1] - missed[1:]) / torch.arange(1, n + 1)).sum()
        for k in at:
            hit[k][numbers == r] = 1 - missed[min(k, n)]
    measures = {"mrr": float(mrr.mean())}
    for k in at:
        measures |= {f"recall@{k}": min(k, n) / n, f"hit@{k}": float(hit[k].mean())}
    return FactTracingLine("chance", measures, {})


def _measured(line: FactTracingLine, key: str) -> str:
    interval = line.intervals.get(key)
    return f"{line.measures[key]:.3f}" + ("" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})")
