"""The retrieval benchmark: does the gradient of a query find the training example that the query was made from?"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.estimators.component_dots import ComponentDots, Id
from lightning_influence.evaluation.kinds import component_kinds
from lightning_influence.evaluation.retrieval_report import RetrievalLine, RetrievalReport
from lightning_influence.metrics.intervals import Interval, bootstrap_interval, wilson_interval
from lightning_influence.metrics.retrieval import retrieval_ranks
from lightning_influence.selection.component_cross_validation import (
    ComponentCrossValidation,
    cross_validate_components,
    group_numbers,
    held_out_interval,
)
from lightning_influence.selection.component_objective import Objective
from lightning_influence.selection.component_pairs import ComponentPairs


@dataclass(frozen=True, eq=False)
class RetrievalSetting:
    """One set of queries, such as paraphrases of training examples or the model's own answers ([SP] section 3.2).

    Attributes:
        dots: Products of the queries with their candidates, by component.
        sources: Id of the training example that each query was made from, by query id or in the order of the
            queries.
        groups: What each query belongs to, in the order of the queries: a group is never on both sides of a split,
            and is one case in the intervals. None: the true source.
        baselines: Other scores of the candidates, higher is more similar, by name: [q, k] in the order of
            ``dots.candidates()``, with anything beyond the end of a shorter list.
    """

    dots: ComponentDots
    sources: Mapping[Id, Id] | Sequence[Id]
    groups: Sequence[Hashable] | None = None
    baselines: Mapping[str, Any] = field(default_factory=dict)


def evaluate_retrieval(
    settings: RetrievalSetting | Mapping[str, RetrievalSetting],
    *,
    candidates: int | None = None,
    kinds: Mapping[str, str] | Callable[[str], str] | None = None,
    recall_at: Sequence[int] = (3,),
    objective: Objective = "accuracy",
    splits: int = 5,
    seed: int = 0,
    eps: float = 0.0,
    progress: bool = True,
) -> RetrievalReport:
    """Accuracy, MRR and Recall@k of the full gradient, of kinds and single components, and of a greedy choice.

    The greedy choice is scored on the queries that it was made on (in-sample, as in [SP]) and on queries that it was
    not made on (`cross_validate_components`); only the second says what to expect of it. A tie counts against the
    true source everywhere. Intervals hold 95 %: for shares Wilson's with the number of groups as the number of cases,
    which is cautious where groups have several queries; for MRR a bootstrap over groups; for the held-out choice
    those of `cross_validate_components`.

    Args:
        settings: One, or several by name.
        candidates: b, the number of candidates that every query is meant to have; None takes what there is.
        kinds: What `component_kinds` takes.
        recall_at: The k of Recall@k.
        objective: What the greedy choice maximises.
        splits: Number of random halves to choose on.
        seed: Of the halves and of the bootstrap.
        eps: ε of the cosine ([SP] section 3.1).
        progress: Whether to show bars when it takes more than a few seconds.

    Raises:
        ValueError: If recorded pairs, sources, groups, baselines or kinds do not fit each other (ids and the nearest
            names are given), before anything long is done.
    """
    named = {"": settings} if isinstance(settings, RetrievalSetting) else dict(settings)
    if not named or not all(isinstance(setting, RetrievalSetting) for setting in named.values()):
        raise ValueError("`evaluate_retrieval(settings)`: expected a RetrievalSetting, or at least one by name.")
    wrong = [k for k in recall_at if isinstance(k, bool) or not isinstance(k, int) or k < 1]
    if wrong:
        raise ValueError(f"`evaluate_retrieval(recall_at={list(recall_at)})`: expected ints >= 1.")
    benches = {name: _Bench.of(setting, candidates, tuple(recall_at), seed, eps) for name, setting in named.items()}
    of_kinds = {name: component_kinds(bench.pairs.components, kinds) for name, bench in benches.items()}
    options: dict[str, Any] = {"splits": splits, "seed": seed, "eps": eps, "progress": progress}
    choices = {
        name: cross_validate_components(bench.pairs, objective, groups=bench.groups.tolist(), **options)
        for name, bench in benches.items()
    }
    lines = [line for name, bench in benches.items() for line in bench.lines(name, choices[name], of_kinds[name])]
    return RetrievalReport(tuple(lines), choices)


def candidate_recall(candidates: Iterable[Iterable[Id]] | Tensor, sources: Sequence[Id] | Tensor) -> float:
    """Share of queries whose true source is among the candidates that a filter found without being told.

    Args:
        candidates: Of each query, as ``Filter.candidates`` gives them without ``must_include``.
        sources: The true source of each query.

    Raises:
        ValueError: If there is not one source for each query, a query has no candidates, or there is no query.

    >>> candidate_recall([[3, 1], [0, 2]], [1, 1])
    0.5
    """
    found = candidates.tolist() if isinstance(candidates, Tensor) else [list(row) for row in candidates]
    wanted = sources.tolist() if isinstance(sources, Tensor) else list(sources)
    empty = [row for row, ids in enumerate(found) if not ids]
    if len(found) != len(wanted) or not found or empty:
        raise ValueError(
            f"`candidate_recall(candidates, sources)`: expected candidates and one source for each query, got "
            f"{len(found)} lists and {len(wanted)} sources; rows without candidates: {empty[:8]}."
        )
    return sum(source in ids for ids, source in zip(found, wanted, strict=True)) / len(found)


@dataclass(frozen=True, eq=False)
class _Way:
    """Ranks [q] of the true sources under some scores, and the components of the scores."""

    group: str
    name: str
    components: Sequence[str] | None
    ranks: Tensor


@dataclass(frozen=True, eq=False)
class _Bench:
    """One setting in rectangular form."""

    pairs: ComponentPairs
    groups: Tensor
    baselines: Mapping[str, Tensor]
    recall_at: tuple[int, ...]
    seed: int
    eps: float

    @classmethod
    def of(cls, setting: RetrievalSetting, b: int | None, recall_at: tuple[int, ...], seed: int, eps: float) -> _Bench:
        pairs = ComponentPairs.from_dots(setting.dots, setting.sources)
        _check_number(setting.dots, pairs, b)
        ids, sources, groups = setting.dots.query_ids, setting.sources, setting.groups
        if groups is None:
            groups = [sources[query] for query in ids] if isinstance(sources, Mapping) else sources
        member = group_numbers(groups, len(ids), "RetrievalSetting")
        baselines = {label: _baseline(label, scores, pairs) for label, scores in setting.baselines.items()}
        return cls(pairs, member, baselines, recall_at, seed, eps)

    def lines(
        self, setting: str, choice: ComponentCrossValidation, kinds: Mapping[str, Sequence[str]]
    ) -> list[RetrievalLine]:
        everything, chosen = self.pairs.components, choice.selection.names
        ways = [_Way("full gradient", "", everything, self.ranks(everything))]
        ways += [_Way("baseline", label, None, self._of(scores)) for label, scores in self.baselines.items()]
        ways += [_Way("greedy, in-sample", "", chosen, self.ranks(chosen))]
        first = len(ways)
        ways += [_Way("kind", kind, names, self.ranks(names)) for kind, names in kinds.items()]
        ways += [_Way("component", name, [name], self.ranks([name])) for name in everything]
        spreads = bootstrap_interval(torch.stack([1 / way.ranks for way in ways]), self.groups, self.seed)
        lines = [self._line(setting, way, spread) for way, spread in zip(ways, spreads, strict=True)]
        return [self._chance(setting), *lines[:first], self._held_out(setting, choice), *lines[first:]]

    def ranks(self, names: Sequence[str]) -> Tensor:
        """Of the true sources by the cosine over some components, [q]."""
        return self._of(self.pairs.cosine(names, self.eps))

    def _of(self, scores: Tensor) -> Tensor:
        return retrieval_ranks(scores, self.pairs.target, self.pairs.mask).cpu()

    def _line(self, setting: str, way: _Way, spread: Interval) -> RetrievalLine:
        cases = int(self.groups.max()) + 1
        accuracy, recall = _mean(way.ranks == 1), {k: _mean(way.ranks <= k) for k in self.recall_at}
        return RetrievalLine(
            setting=setting,
            group=way.group,
            name=way.name,
            components=None if way.components is None else len(way.components),
            share=None if way.components is None else self.pairs.share(way.components),
            accuracy=accuracy,
            mrr=_mean(1 / way.ranks),
            recall=recall,
            accuracy_interval=wilson_interval(accuracy, cases),
            mrr_interval=spread,
            recall_intervals={k: wilson_interval(value, cases) for k, value in recall.items()},
        )

    def _held_out(self, setting: str, choice: ComponentCrossValidation) -> RetrievalLine:
        """Means over the splits."""
        ranks = torch.full((len(choice.splits), self.pairs.num_queries), torch.nan, dtype=torch.float64)
        for row, split in enumerate(choice.splits):
            held = list(split.held_out)
            ranks[row, held] = self.ranks(split.selection.names)[held].double()
        hits = {k: torch.where(ranks.isnan(), ranks, (ranks <= k).double()) for k in (1, *self.recall_at)}
        shares = {k: float(values.nanmean(1).mean()) for k, values in hits.items()}
        intervals = {k: held_out_interval(values, self.groups, "accuracy") for k, values in hits.items()}
        return RetrievalLine(
            setting=setting,
            group="greedy, held-out",
            name="",
            components=sum(len(split.selection) for split in choice.splits) / len(choice.splits),
            share=sum(split.selection.share for split in choice.splits) / len(choice.splits),
            accuracy=shares[1],
            mrr=float((1 / ranks).nanmean(1).mean()),
            recall={k: shares[k] for k in self.recall_at},
            accuracy_interval=intervals[1],
            mrr_interval=held_out_interval(1 / ranks, self.groups, "mrr"),
            recall_intervals={k: intervals[k] for k in self.recall_at},
        )

    def _chance(self, setting: str) -> RetrievalLine:
        """What a random order without ties is expected to reach, 1/b for accuracy."""
        counts = self.pairs.mask.sum(1).cpu()
        mrr = [sum(1 / rank for rank in range(1, count + 1)) / count for count in counts.tolist()]
        recall = {k: _mean((k / counts).clamp(max=1)) for k in self.recall_at}
        return RetrievalLine(setting, "chance", "", None, None, _mean(1 / counts), sum(mrr) / len(mrr), recall)


def _check_number(dots: ComponentDots, pairs: ComponentPairs, b: int | None) -> None:
    if b is None:
        return
    if isinstance(b, bool) or not isinstance(b, int) or b < 2:
        raise ValueError(f"`evaluate_retrieval(candidates={b!r})`: expected an int >= 2 or None.")
    counts = dict(zip(dots.query_ids, pairs.mask.sum(1).tolist(), strict=True))
    other = {query: count for query, count in counts.items() if count != b}
    if other:
        raise ValueError(
            f"`evaluate_retrieval(candidates={b})`: expected {b} candidates for every query; {len(other)} of "
            f"{len(counts)} have another number, such as {dict(list(other.items())[:8])}. A pool of fewer than {b} "
            f"examples cannot give {b}: take fewer, or None to score lists of any length."
        )


def _baseline(name: str, scores: Any, pairs: ComponentPairs) -> Tensor:
    found = torch.as_tensor(scores, device=pairs.dots.device)
    call = f"RetrievalSetting(baselines={{{name!r}: ...}})"
    if found.shape != pairs.mask.shape:
        raise ValueError(
            f"`{call}`: expected scores {list(pairs.mask.shape)}, one for each query and candidate, got "
            f"{list(found.shape)}."
        )
    if bool((found.isnan() & pairs.mask).any()):
        rows = (found.isnan() & pairs.mask).any(1).nonzero().flatten().tolist()
        raise ValueError(f"`{call}`: expected numbers, found NaN for queries {rows[:8]}.")
    return found


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
