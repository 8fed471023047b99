"""What "Select or Project?" found, and whether it is found here: sentences that are made from the numbers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from pair_sets import GENERATED
from torch import Tensor

from lightning_influence.evaluation import RetrievalReport
from lightning_influence.metrics.intervals import Interval, normal_interval, wilson_interval
from lightning_influence.metrics.retrieval import retrieval_ranks
from lightning_influence.report import prefix_ranks
from lightning_influence.selection.component_cross_validation import held_out_interval
from lightning_influence.selection.component_pairs import ComponentPairs

NEARLY_ALWAYS, FEW = 0.9, 0.05  # what counts as "nearly always", and as few parameters
DOTS = "component dot products"  # the name of the stage
HOLDS, FAILS, UNTOLD = "holds", "does not hold", "cannot be told"


@dataclass(frozen=True)
class Difference:
    """Accuracy of the first minus that of the second, on the same queries, with its 95 % confidence interval."""

    setting: str
    first: str
    second: str
    value: float
    interval: Interval

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:+.3f} ({low:+.3f} to {high:+.3f})"

    @property
    def better(self) -> str:
        """Whether the first is better: the whole interval must be on one side of zero."""
        low, high = self.interval
        return HOLDS if low > 0 else FAILS if high < 0 else UNTOLD


@dataclass(frozen=True)
class Finding:
    """A claim, in which setting it is looked at, what came of it, and the numbers that say so."""

    claim: str
    setting: str
    verdict: str
    numbers: str


class Hits:
    """Which queries of one setting find their source, by every way: [q] of 0 and 1, [splits, q] for held-out."""

    def __init__(
        self, setting: str, pairs: ComponentPairs, report: RetrievalReport, baselines: Mapping[str, Tensor]
    ) -> None:
        choice = report.choices[setting]
        self.setting, self.number = setting, pairs.num_queries
        self.found = {"full gradient": (retrieval_ranks(pairs.cosine(), pairs.target, pairs.mask) == 1).double()}
        for name, scores in baselines.items():
            self.found[name] = (retrieval_ranks(scores, pairs.target, pairs.mask) == 1).double()
        self.held_out = torch.full((len(choice.splits), pairs.num_queries), torch.nan, dtype=torch.float64)
        for row, split in enumerate(choice.splits):
            held = list(split.held_out)
            self.held_out[row, held] = (prefix_ranks(pairs, split.selection.names)[-1] == 1).double()[held]

    def difference(self, first: str, second: str) -> Difference:
        """Of two ways that were not chosen on these queries."""
        values = self.found[first] - self.found[second]
        return Difference(self.setting, first, second, float(values.mean()), _around(values))

    def held_out_minus(self, second: str) -> Difference:
        """Of the held-out greedy choice and another way, on the queries that were held out."""
        values = self.held_out - self.found[second]
        member = torch.arange(self.number)
        interval = held_out_interval(values, member, "similarity")
        return Difference(self.setting, "greedy, held-out", second, float(values.nanmean(1).mean()), interval)


def findings(
    report: RetrievalReport, hits: Mapping[str, Hits], rewritten: str, seconds: Mapping[str, float]
) -> list[Finding]:
    """All claims, setting by setting; the last ones by the seconds that stages took."""
    found = [_nearly_always(report, rewritten), _harder(hits, rewritten)]
    for setting, own in hits.items():
        found += [*_greedy(report, own, setting), *_projections(own), *_others(own)]
    return [*found, *_costs(seconds)]


def _nearly_always(report: RetrievalReport, setting: str) -> Finding:
    line = report.line("full gradient", setting=setting)
    low, high = line.accuracy_interval or (line.accuracy, line.accuracy)
    verdict = HOLDS if low > NEARLY_ALWAYS else FAILS if high < NEARLY_ALWAYS else UNTOLD
    claim = f"The full gradient nearly always finds the source (above {NEARLY_ALWAYS}; [SP] 0.993 for paraphrases)"
    return Finding(claim, setting, verdict, f"accuracy {line.accuracy:.3f} ({low:.3f} to {high:.3f})")


def _harder(hits: Mapping[str, Hits], rewritten: str) -> Finding:
    values = hits[rewritten].found["full gradient"] - hits[GENERATED].found["full gradient"]
    difference = Difference("", rewritten, GENERATED, float(values.mean()), _around(values))
    claim = f"{GENERATED.capitalize()} queries are harder than {rewritten} ones ([SP] 0.218 against 0.993)"
    return Finding(claim, "both", difference.better, f"difference {difference}")


def _greedy(report: RetrievalReport, hits: Hits, setting: str) -> Iterator[Finding]:
    path, whole = report.choices[setting].path, report.line("full gradient", setting=setting)
    claim = (
        f"Chosen components with less than {100 * FEW:g} % of the parameters do at least as well as all on the queries "
    )
    few = [(score, -share) for score, share in zip(path.scores, path.shares, strict=True) if share < FEW]
    if few:
        score, share = max(few)
        verdict = HOLDS if score >= whole.accuracy else FAILS
        numbers = f"{score:.3f} with {-100 * share:.3g} %, full gradient {whole.accuracy:.3f}"
    else:
        verdict, numbers = FAILS, f"the first one chosen has {100 * path.shares[0]:.3g} %"
    yield Finding(f"{claim}that they were chosen on", setting, verdict, numbers)
    difference = hits.held_out_minus("full gradient")
    held = report.line("greedy, held-out", setting=setting)
    numbers = f"{held.accuracy:.3f} with {100 * (held.share or 0):.3g} %, difference {difference}"
    yield Finding("They do better than all components on other queries", setting, difference.better, numbers)


def _projections(hits: Hits) -> Iterator[Finding]:
    for name in (name for name in hits.found if "projection" in name):
        difference = hits.held_out_minus(name)
        claim = f"Chosen components do better than the {name}, on other queries"
        yield Finding(claim, hits.setting, difference.better, f"difference {difference}")
        difference = hits.difference("full gradient", name)
        claim = f"The full gradient does better than the {name}"
        yield Finding(claim, hits.setting, difference.better, f"difference {difference}")


def _others(hits: Hits) -> Iterator[Finding]:
    difference = hits.difference("full gradient", "BM25")
    claim = "The full gradient does better than BM25 alone"
    yield Finding(claim, hits.setting, difference.better, f"difference {difference}")


def _costs(seconds: Mapping[str, float]) -> Iterator[Finding]:
    """Of projections against products of all components; only of stages that were not resumed."""
    dots = seconds.get(DOTS)
    for name in (name for name in seconds if "projection" in name and dots is not None):
        times = seconds[name] / dots
        claim = f"The {name} takes longer than the products of all components ([SP]: 13 to 190 times)"
        yield Finding(claim, "cost", HOLDS if times > 1 else FAILS, f"{times:.2f} times as long")


def sentences(found: Sequence[Finding]) -> str:
    """A line of Markdown for each."""
    return "\n".join(f"- **{f.verdict}** ({f.setting}): {f.claim}: {f.numbers}." for f in found)


def _around(values: Tensor) -> Interval:
    """Of a mean of differences -1, 0 and 1; where all are equal, as wide as Wilson's interval of no case at all."""
    low, high = normal_interval(values)
    if low == high:
        width = wilson_interval(0.0, len(values))[1]
        low, high = low - width, high + width
    return max(-1.0, low), min(1.0, high)
