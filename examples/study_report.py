"""The study of components and projections as numbers with intervals, tables, pictures and one page of text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from study_findings import Finding, Hits, findings, sentences
from study_stages import Cost, Stages
from torch import Tensor

from lightning_influence.estimators.component_dots import ComponentDots
from lightning_influence.evaluation import RetrievalReport, RetrievalSetting, evaluate_retrieval
from lightning_influence.report import (
    ShareCurve,
    csv_text,
    depth_plot,
    held_out_curve,
    kind_table,
    markdown,
    method_table,
    path_curve,
    share_plot,
)
from lightning_influence.report.component_tables import Table, cell, percent
from lightning_influence.selection.component_greedy import greedy_components
from lightning_influence.selection.component_pairs import ComponentPairs

PACKAGES = ("torch", "transformers")
OBJECTIVES = {"mrr": "MRR", "similarity": "similarity to the full gradient"}
BARE = "bare forward and backward"  # the name of the stage
DRAWN = 10**7  # random numbers that are timed


@dataclass(frozen=True)
class Run:
    """What was asked for.

    Attributes:
        quick: A tiny model instead of SmolLM2.
        pairs: File with the rows; None for templates.
        queries: Number of pairs.
        candidates: Of each query.
        max_tokens: Of a row, longer ones are left out.
        new_tokens: Of a completion by the model.
        shares: Of the parameters, to project to.
        seeds: Random projections of each size.
        trak: Whether to take traker's projections too.
        memory: Bytes for what is kept of examples.
        seed: Of everything that is drawn.
        out: Folder for everything written.
        cache: Folder for the model's weights.
        command: The command line.
    """

    quick: bool
    pairs: Path | None
    queries: int
    candidates: int
    max_tokens: int
    new_tokens: int
    shares: tuple[float, ...]
    seeds: int
    trak: bool
    memory: int
    seed: int
    out: Path
    cache: Path
    command: str

    @property
    def longest(self) -> int:
        """Tokens of a row at most: a completion may be tokenised in another way than it was generated."""
        return self.max_tokens + 2 * self.new_tokens


@dataclass(frozen=True, eq=False)
class Measured:
    """What the passes over the model gave.

    Attributes:
        origin: Of the rows.
        rewritten: Name of the setting whose queries were reworded.
        left_out: Rows of the origin that were too long.
        tokens: Of all rows, each once.
        parameters: Of the model; some may belong to no component.
        dots: By setting.
        similarities: BM25 scores [q, b] by setting.
        recall: Share of queries, by setting, whose source BM25 finds among its candidates without being told.
        cosines: Of projected gradients: [q, b] by setting by name of the projection.
        shares: Of the parameters, by name of the projection.
    """

    origin: str
    rewritten: str
    left_out: int
    tokens: int
    parameters: int
    dots: Mapping[str, ComponentDots]
    similarities: Mapping[str, Tensor]
    recall: Mapping[str, float]
    cosines: Mapping[str, Mapping[str, Tensor]]
    shares: Mapping[str, float]

    def baselines(self, setting: str) -> dict[str, Tensor]:
        """Scores [q, b] that are no cosines of whole components."""
        return {"BM25": self.similarities[setting], **{name: of[setting] for name, of in self.cosines.items()}}

    def with_projection(self, name: str, share: float, cosines: Mapping[str, Tensor]) -> Measured:
        """One projection more."""
        return replace(self, cosines={**self.cosines, name: cosines}, shares={**self.shares, name: share})

    @property
    def sizes(self) -> tuple[int, ...]:
        """Parameters of each component."""
        return next(iter(self.dots.values())).sizes


@dataclass(frozen=True, eq=False)
class Results:
    """What the numbers say.

    Attributes:
        report: The benchmark, greedy by accuracy.
        others: The same with greedy by other objectives.
        pairs: Products in rectangular form, by setting.
        findings: Of the paper, and whether they hold.
    """

    report: RetrievalReport
    others: Mapping[str, RetrievalReport]
    pairs: Mapping[str, ComponentPairs]
    findings: list[Finding]


def evaluate(run: Run, measured: Measured, stages: Stages) -> Results:
    """The benchmark in all settings."""
    sources = list(range(run.queries))
    pairs = {name: ComponentPairs.from_dots(dots, sources) for name, dots in measured.dots.items()}
    with stages.stage("greedy choice, one whole path", run.queries):
        greedy_components(pairs[measured.rewritten], progress=False)

    def bench(**options: str) -> RetrievalReport:
        settings = {
            name: RetrievalSetting(dots, sources, baselines=measured.baselines(name))
            for name, dots in measured.dots.items()
        }
        return evaluate_retrieval(settings, candidates=run.candidates, seed=run.seed, progress=False, **options)  # type: ignore[arg-type]

    with stages.stage("evaluation, all of it", run.queries):
        report = bench()
        others = {objective: bench(objective=objective) for objective in OBJECTIVES}
    seconds = {name: cost.seconds for name, cost in stages.costs.items()}
    hits = {name: Hits(name, pairs[name], report, measured.baselines(name)) for name in pairs}
    return Results(report, others, pairs, findings(report, hits, measured.rewritten, seconds))


def write_report(run: Run, measured: Measured, stages: Stages, seconds: float) -> str:
    """Evaluate, write everything into the folder of the run, and return the summary."""
    results = evaluate(run, measured, stages)
    costs = cost_rows(stages.costs, measured, 3 * run.queries)
    run.out.mkdir(parents=True, exist_ok=True)
    depth_plot(results.report).savefig(run.out / "depth.png", dpi=150)
    share_plot(results.report, *_curves(measured, results)).savefig(run.out / "share.png", dpi=150)
    (run.out / "results.csv").write_text(csv_text(results.report.rows()))
    (run.out / "costs.csv").write_text(csv_text(costs))
    chosen = {setting: choice.selection.to_dict() for setting, choice in results.report.choices.items()}
    (run.out / "components.json").write_text(json.dumps(chosen, indent=2) + "\n")
    (run.out / "results.json").write_text(json.dumps(_plain(run, measured, results, costs, seconds), indent=2) + "\n")
    text = summary(run, measured, results, costs, seconds)
    (run.out / "summary.md").write_text(text)
    return text


def _curves(measured: Measured, results: Results) -> tuple[dict[str, list[ShareCurve]], dict[str, list[ShareCurve]]]:
    """Curves and points of the plot over shares, by setting."""
    curves, points = {}, {}
    for setting, pairs in results.pairs.items():
        choice = results.report.choices[setting]
        similar = results.others["similarity"].choices[setting]
        curves[setting] = [
            held_out_curve(pairs, choice, "greedy, held-out"),
            path_curve(pairs, choice.path, "greedy, in-sample"),
            path_curve(pairs, similar.path, "greedy by similarity, in-sample"),
        ]
        kinds = dict.fromkeys(name.split(",")[0] for name in measured.shares)
        points[setting] = [_projected(kind, measured, results, setting) for kind in kinds]
    return curves, points


def _projected(kind: str, measured: Measured, results: Results, setting: str) -> ShareCurve:
    """All sizes and seeds of one kind of projection."""
    names = [name for name in measured.shares if name.split(",")[0] == kind]
    lines = [results.report.line("baseline", name, setting) for name in names]
    intervals = tuple(line.accuracy_interval for line in lines if line.accuracy_interval is not None)
    shares = tuple(measured.shares[name] for name in names)
    return ShareCurve(kind, shares, tuple(line.accuracy for line in lines), intervals)


def cost_rows(costs: Mapping[str, Cost], measured: Measured, distinct: int) -> list[dict[str, str | float | None]]:
    """Seconds of each stage, by example, and in relation to bare passes over the same tokens."""
    bare = costs[BARE]
    rows: list[dict[str, str | float | None]] = []
    for cost in costs.values():
        tokens = cost.tokens or (
            measured.tokens if cost.stage in measured.cosines and cost.examples == distinct else None
        )
        ratio = None if tokens is None else cost.seconds / tokens / (bare.seconds / bare.tokens)  # type: ignore[operator]
        row = {"stage": cost.stage, "seconds": cost.seconds, "examples": cost.examples}
        rows.append({**row, "seconds_per_example": cost.seconds / cost.examples, "ratio_to_bare_passes": ratio})
    return rows


def _plain(
    run: Run, measured: Measured, results: Results, costs: list[dict[str, str | float | None]], seconds: float
) -> dict[str, object]:
    options = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(run).items()}
    greedy = {
        objective: [
            report.line(f"greedy, {kind}", setting=setting).to_dict() for setting in report.choices for kind in KINDS
        ]
        for objective, report in results.others.items()
    }
    return {
        "options": options,
        "rows": {"origin": measured.origin, "left_out": measured.left_out, "tokens": measured.tokens},
        "candidate_recall": dict(measured.recall),
        "lines": results.report.rows(),
        "greedy_by": greedy,
        "findings": [asdict(finding) for finding in results.findings],
        "costs": costs,
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in PACKAGES},
    }


KINDS = ("in-sample", "held-out")


def greedy_table(results: Results, setting: str) -> Table:
    """The accuracy that greedy choices by different objectives reach."""
    head = ["chosen by", "components", "parameters", "in-sample accuracy", "held-out accuracy (95 %)"]
    body = []
    for name, report in {"accuracy": results.report, **{OBJECTIVES[k]: r for k, r in results.others.items()}}.items():
        own, held = (report.line(f"greedy, {kind}", setting=setting) for kind in KINDS)
        size = [f"{own.components:.4g}", percent(own.share or 0)]
        body.append([name, *size, cell(own.accuracy), cell(held.accuracy, held.accuracy_interval)])
    return [head, *body]


def cost_table(rows: list[dict[str, str | float | None]]) -> Table:
    """`cost_rows` for readers."""
    head = ["stage", "seconds", "examples", "seconds per example", "times bare passes"]
    return [head, *[[_number(value) for value in row.values()] for row in rows]]


def _number(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value}" if isinstance(value, int) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def trak_cost(measured: Measured, share: float) -> str:
    """How many random numbers traker would draw for one batch, and how long that takes at the speed measured here."""
    started = time.perf_counter()
    torch.randn(DRAWN)
    rate = DRAWN / (time.perf_counter() - started)
    numbers = share * sum(float(size) ** 2 for size in measured.sizes)
    hours = numbers / rate / 3600
    return (
        f"traker's random matrices for {percent(share)} of the parameters have {numbers:.2g} entries, which are drawn "
        f"for every batch: {hours:.2g} hours for a batch at the {rate:.1g} numbers a second of this machine."
    )


def summary(
    run: Run, measured: Measured, results: Results, costs: list[dict[str, str | float | None]], seconds: float
) -> str:
    """One page of Markdown."""
    tables = partial(_tables, list(measured.dots))
    trak = "" if run.trak or not run.shares else f"\n{trak_cost(measured, min(run.shares))}\n"
    return f"""{_introduction(run, measured)}

{tables(lambda setting: method_table(results.report, setting))}

What is the best on these queries, or chosen on them (in-sample), flatters itself; held-out is what to expect of it.

## Greedy choices by other objectives

{tables(lambda setting: greedy_table(results, setting))}

## Kinds of components

{markdown(kind_table(results.report))}

`depth.png` shows single components by layer, `share.png` greedy choices and projections over the share of parameters.

## Does what [SP] found hold here?

{sentences(results.findings)}

## Cost

{markdown(cost_table(costs))}

Bare passes are forward and backward over a sample of the base rows, for all weights at once, and the unit of the last
column, token by token. Threads: {torch.get_num_threads()}.
{trak}
Files: `results.json`, `results.csv` (every line), `components.json` (the choices, ready for `components=`),
`costs.csv`, `completions.jsonl`, `recording` (the products, for `Store.open`).

`{run.command}`: {seconds:.0f} s, {", ".join(f"{name} {version(name)}" for name in PACKAGES)}.
"""


def _introduction(run: Run, measured: Measured) -> str:
    """What was looked at, and in which way it is not what the paper looked at."""
    model = "A tiny random Llama, trained on the base rows for a few steps" if run.quick else "SmolLM2-135M-Instruct"
    trained = "" if run.quick else ", as it is: unlike in [SP] it was not fine-tuned on the base rows"
    same = (
        "" if measured.rewritten == "paraphrased" else f" In place of a paraphrase, {measured.rewritten}: same prompt."
    )
    recall = ", ".join(f"{value:.3f} ({name})" for name, value in measured.recall.items())
    return f"""# Select or project? {run.queries} queries on {"a tiny model" if run.quick else "SmolLM2-135M"}

{model}{trained}. {run.queries} rows of {measured.origin} are the base set ({measured.left_out} pairs with a row of more
than {run.max_tokens} tokens were left out), and each has a query in every setting: {", ".join(measured.dots)} (the
prompt of the {measured.rewritten} row, at most {run.new_tokens} tokens of the most likely continuation).{same}
BM25 gives every query {run.candidates} candidates, its source among them; without being told it would have found the
source for a share of {recall}. Gradients are of the summed loss of the answer's tokens, in {len(measured.sizes)} weight
matrices ({percent(sum(measured.sizes) / measured.parameters)} of the parameters). [SP] is arXiv 2601.16651. A tie
counts against the source. Intervals hold 95 %."""


def _tables(settings: list[str], table: Callable[[str], Table]) -> str:
    return "\n\n".join(f"### {setting}\n\n{markdown(table(setting))}" for setting in settings)
