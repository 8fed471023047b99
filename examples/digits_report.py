"""Results of the digits demo as numbers with intervals, tables, a plot and one page of text."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
from scipy.stats import t as student

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

METHODS = {"interaction-aware": "C0", "additive": "C3", "random": "C7", "whole pool": "C2"}
PACKAGES = ("torch", "lightning", "scikit-learn")


@dataclass(frozen=True)
class Run:
    """What was asked for.

    Attributes:
        noise: Shares of wrong labels, one pool each.
        seeds: Repetitions, with seeds 0, 1, ...
        sizes: Shares of the pool that are selected.
        steps: Steps of training on a selection.
        warm_up_steps: Steps of training on the pool before selecting.
        out: Folder for everything written.
        command: The command line.
    """

    noise: tuple[float, ...]
    seeds: int
    sizes: tuple[float, ...]
    steps: int
    warm_up_steps: int
    out: Path
    command: str


@dataclass(frozen=True)
class Result:
    """One trained network. Loss and accuracy are held-out; entropy, in nats, and wrong share are of its data."""

    noise: float
    seed: int
    method: str
    rows: int
    loss: float
    accuracy: float
    class_entropy: float
    wrong: float


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds; standard deviation, and half-width of the 95 % interval of the mean, None for one seed."""

    values: tuple[float, ...]
    mean: float
    std: float | None
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        mean, n = statistics.fmean(values), len(values)
        if n == 1:
            return cls(tuple(values), mean, None, None)
        std = statistics.stdev(values)
        return cls(tuple(values), mean, std, float(student.ppf(0.975, n - 1)) * std / math.sqrt(n))

    def below_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.half_width is not None and self.mean + self.half_width < 0

    def above_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.half_width is not None and self.mean - self.half_width > 0


@dataclass(frozen=True)
class Line:
    """One line of the table: a method at a size, over seeds.

    Attributes:
        minus_random: Difference of the losses to random rows of the same number, seed by seed.
        minus_additive: The same to additive influence.
    """

    noise: float
    method: str
    rows: int
    loss: Estimate
    minus_random: Estimate | None
    minus_additive: Estimate | None
    accuracy: Estimate
    class_entropy: Estimate
    wrong: Estimate


def summarise(results: Sequence[Result]) -> list[Line]:
    """A line for each noise, size and method, in that order; the whole pool last."""
    groups: dict[tuple[float, str, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.noise, result.method, result.rows), []).append(result)
    return [_line(groups, *key) for key in groups]


def _line(groups: dict[tuple[float, str, int], list[Result]], noise: float, method: str, rows: int) -> Line:
    own = groups[noise, method, rows]

    def minus(other: str) -> Estimate | None:
        others = {r.seed: r.loss for r in groups.get((noise, other, rows), [])}
        return None if not others or other == method else Estimate.of([r.loss - others[r.seed] for r in own])

    return Line(
        noise,
        method,
        rows,
        Estimate.of([r.loss for r in own]),
        minus("random"),
        minus("additive"),
        Estimate.of([r.accuracy for r in own]),
        Estimate.of([r.class_entropy for r in own]),
        Estimate.of([r.wrong for r in own]),
    )


def table(lines: Sequence[Line]) -> str:
    """Lines of one pool in Markdown."""
    head = (
        "rows",
        "selection",
        "held-out loss",
        "minus random (95 %)",
        "accuracy %",
        "class entropy",
        "wrong labels %",
    )
    body = [
        (
            str(line.rows),
            line.method,
            _spread(line.loss),
            _interval(line.minus_random),
            _spread(line.accuracy, 100, 1),
            _spread(line.class_entropy),
            _spread(line.wrong, 100, 1),
        )
        for line in lines
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    dashes = tuple("-" * width for width in widths)
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, dashes, *body)]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def write_report(run: Run, results: Sequence[Result], seconds: float) -> str:
    """Write results, plot and summary into the folder of the run, and return the summary."""
    lines = summarise(results)
    run.out.mkdir(parents=True, exist_ok=True)
    with (run.out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(map(asdict, results))
    everything = {
        "options": {**asdict(run), "out": str(run.out)},
        "seconds": round(seconds, 1),
        "versions": _versions(),
        "summary": [asdict(line) for line in lines],
        "results": [asdict(result) for result in results],
    }
    (run.out / "results.json").write_text(json.dumps(everything, indent=2, allow_nan=False) + "\n")
    plot(run, lines, run.out / "held_out_loss.png")
    text = summary(run, lines, seconds)
    (run.out / "summary.md").write_text(text)
    return text


def plot(run: Run, lines: Sequence[Line], path: Path) -> None:
    """Held-out loss over the size of the selection, one panel for each pool; bars are standard deviations."""
    size = (1 + 4.5 * len(run.noise), 4)
    figure, panels = plt.subplots(1, len(run.noise), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axes, noise in zip(panels[0], run.noise, strict=True):
        for method, colour in METHODS.items():
            own = [line for line in lines if (line.noise, line.method) == (noise, method)]
            losses, spreads = [line.loss.mean for line in own], [line.loss.std or 0.0 for line in own]
            if method == "whole pool":
                axes.axhline(losses[0], color=colour, linestyle="--", label=f"{method}, {own[0].rows} rows")
                axes.axhspan(losses[0] - spreads[0], losses[0] + spreads[0], color=colour, alpha=0.15)
            else:
                rows = [line.rows for line in own]
                axes.errorbar(rows, losses, spreads, color=colour, marker="o", capsize=3, label=method)
        axes.set(title=f"{percent(noise)} wrong labels", xlabel="rows selected", yscale="log")
        axes.set_xticks(sorted({line.rows for line in lines if line.method != "whole pool"}))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    panels[0][0].set_ylabel("held-out loss")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def summary(run: Run, lines: Sequence[Line], seconds: float) -> str:
    """One page of Markdown."""
    seeds = "1 seed" if run.seeds == 1 else f"{run.seeds} seeds"
    few = " So few seeds leave wide intervals." if run.seeds < 4 else ""
    pools = "\n\n".join(
        f"## {percent(noise)} wrong labels in the pool\n\n{table(own)}\n\n{verdict(own)}"
        for noise in run.noise
        for own in [[line for line in lines if line.noise == noise]]
    )
    return f"""# Digits: train on a part of the pool

An MLP 64-128-64-10 is warmed up on a pool of 1000 digits for {run.warm_up_steps} steps of SGD while its curvature
(EK-FAC) is recorded. Each selection lowers the predicted loss on 300 target digits; a fresh network is trained on
it for {run.steps} steps of the same number of rows, and measured on digits that neither has seen. Mean ± standard
deviation over {seeds}, each with its own split, wrong labels and weights. The difference to random rows is taken
seed by seed; its 95 % interval is Student's.{few} Ten equal classes have an entropy of 2.30.

{pools}

![held-out loss](held_out_loss.png)

Files: `results.csv` (every network), `results.json` (also options and means), `selections/` (rows in pick order,
with predicted gains), `recordings/` (curvature).

`{run.command}`: {seconds:.0f} s with {", ".join(f"{name} {number}" for name, number in _versions().items())}.
"""


def verdict(lines: Sequence[Line]) -> str:
    """What the numbers of one pool say about the interaction-aware selection, good or bad."""
    own = [line for line in lines if line.method == "interaction-aware"]
    whole = next(line.loss for line in lines if line.method == "whole pool")
    minus_whole = [[a - b for a, b in zip(line.loss.values, whole.values, strict=True)] for line in own]
    others: dict[str, list[Estimate | None]] = {
        "additive influence": [line.minus_additive for line in own],
        "random rows": [line.minus_random for line in own],
        "the whole pool": [Estimate.of(differences) for differences in minus_whole],
    }
    return "\n".join(_compared(other, [line.rows for line in own], found) for other, found in others.items())


def _compared(other: str, rows: Sequence[int], differences: Sequence[Estimate | None]) -> str:
    pairs = [(size, difference) for size, difference in zip(rows, differences, strict=True) if difference is not None]
    values = [value for _, difference in pairs for value in difference.values]
    below = [str(size) for size, difference in pairs if difference.below_zero()]
    above = [str(size) for size, difference in pairs if difference.above_zero()]
    lower = sum(value < 0 for value in values)
    return (
        f"- Interaction-aware against {other}: lower loss in {lower} of {len(values)} pairs of networks; beyond the "
        f"spread over seeds (95 %), lower at {_listed(below)}, higher at {_listed(above)}."
    )


def _listed(sizes: Sequence[str]) -> str:
    return f"{', '.join(sizes)} rows" if sizes else "no size"


def _spread(value: Estimate, factor: float = 1, digits: int = 2) -> str:
    spread = "" if value.std is None else f" ± {factor * value.std:.{digits}f}"
    return f"{factor * value.mean:.{digits}f}{spread}"


def _interval(value: Estimate | None) -> str:
    if value is None:
        return ""
    if value.half_width is None:
        return f"{value.mean:+.2f}"
    return f"{value.mean:+.2f} [{value.mean - value.half_width:+.2f}, {value.mean + value.half_width:+.2f}]"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
