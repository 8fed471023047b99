"""Results of the retrieval benchmark as tables: ways to find the source, and kinds of components."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_influence.evaluation.kinds import kind_of
from lightning_influence.evaluation.retrieval_report import RetrievalLine, RetrievalReport
from lightning_influence.metrics.intervals import Interval

Table = list[list[str]]  # the head first
WAYS = ("full gradient", "greedy, held-out", "greedy, in-sample", "kind", "component", "baseline", "chance")
_ON_THESE = "best on these queries"
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def layer_of(name: str) -> int | None:
    """The number of the layer in a component's name; None for a component outside the layers.

    >>> layer_of("model.layers.12.self_attn.q_proj"), layer_of("model.embed_tokens")
    (12, None)
    """
    found = _LAYER.search(name)
    return None if found is None else int(found.group(1))


def best_line(report: RetrievalReport, setting: str, group: str, measure: str = "accuracy") -> RetrievalLine:
    """The best kind or single component in a setting; of equal ones the first. It is chosen on the same queries.

    Raises:
        ValueError: If there is none of that group.
    """
    lines = [line for line in report.lines if (line.setting, line.group) == (setting, group)]
    if not lines:
        known = list(dict.fromkeys((line.setting, line.group) for line in report.lines))
        raise ValueError(f"`best_line({setting!r}, {group!r})`: there is no such line; expected one of {known[:12]}.")
    return max(lines, key=lambda line: _measure(line, measure)[0])


def method_table(report: RetrievalReport, setting: str, measures: Sequence[str] = ("accuracy", "mrr")) -> Table:
    """Every way to find the source in one setting, the best kind and the best single component among them.

    Args:
        report: From `evaluate_retrieval`.
        setting: Which of its settings.
        measures: Names as in `RetrievalLine.measures`.

    Raises:
        ValueError: If the setting or a measure is not in the report.
    """
    shown: list[tuple[str, RetrievalLine]] = []
    for group in WAYS:
        if group in ("kind", "component"):
            line = best_line(report, setting, group, measures[0])
            shown.append((f"{'single ' * (group == 'component')}{group}, {_ON_THESE}: {line.name}", line))
        else:
            own = [line for line in report.lines if (line.setting, line.group) == (setting, group)]
            shown += [(line.name or group, line) for line in own]
    head = ["found by", "components", "parameters", *(f"{measure} (95 %)" for measure in measures)]
    body = [[name, *_size(line), *(cell(*_measure(line, m)) for m in measures)] for name, line in shown]
    return [head, *body]


def kind_table(report: RetrievalReport, measure: str = "accuracy") -> Table:
    """Each kind of component, in every setting: all of the kind together, and the best single one of it by layer.

    Raises:
        ValueError: If the measure is not in the report.
    """
    settings = list(report.choices)
    kinds = {line.name: line for line in report.lines if line.group == "kind" and line.setting == settings[0]}
    head = ["kind", "components", "parameters"]
    for setting in settings:
        head += [f"{setting}: {measure} (95 %)", f"{setting}: best single"]
    body = []
    for kind, line in kinds.items():
        cells = [kind, *_size(line)]
        for setting in settings:
            whole = report.line("kind", kind, setting)
            cells += [cell(*_measure(whole, measure)), _best_single(report, setting, kind, measure)]
        body.append(cells)
    return [head, *body]


def markdown(table: Table) -> str:
    """A table of Markdown, its columns aligned in the text as well.

    >>> print(markdown([["kind", "accuracy"], ["up_proj", "0.975"]]))
    | kind    | accuracy |
    | ------- | -------- |
    | up_proj | 0.975    |
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in table]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Dicts with the same keys, such as `RetrievalReport.rows` gives, as CSV; None is an empty cell.

    >>> print(csv_text([{"kind": "up", "share": 0.25}, {"kind": "down", "share": None}]))
    kind,share
    up,0.25
    down,
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def cell(value: float, interval: Interval | None = None) -> str:
    """A number with its interval.

    >>> cell(0.5, (0.25, 0.75))
    '0.500 (0.250 to 0.750)'
    """
    return f"{value:.3f}" if interval is None else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def percent(share: float) -> str:
    """A share with three digits.

    >>> percent(0.0123)
    '1.23 %'
    """
    return f"{100 * share:.3g} %"


def _size(line: RetrievalLine) -> list[str]:
    number = "" if line.components is None else f"{line.components:.4g}"
    return [number, "" if line.share is None else percent(line.share)]


def _measure(line: RetrievalLine, measure: str) -> tuple[float, Interval | None]:
    if measure not in line.measures:
        raise ValueError(f"`measure={measure!r}`: expected one of {', '.join(map(repr, line.measures))}.")
    return line.measures[measure]


def _best_single(report: RetrievalReport, setting: str, kind: str, measure: str) -> str:
    own = [x for x in report.lines if (x.setting, x.group) == (setting, "component") and kind_of(x.name) == kind]
    if not own:  # kinds of the caller's own, which the names do not tell
        return ""
    best = max(own, key=lambda line: _measure(line, measure)[0])
    layer = layer_of(best.name)
    return f"{_measure(best, measure)[0]:.3f}{'' if layer is None else f', layer {layer}'}"
