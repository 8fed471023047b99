"""Results of a retrieval benchmark as lines, dicts and a table of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_influence.metrics.intervals import Interval
from lightning_influence.selection.component_cross_validation import ComponentCrossValidation


@dataclass(frozen=True)
class RetrievalLine:
    """One way to find the true source, in one setting.

    Attributes:
        setting: Name of the setting.
        group: ``"chance"``, ``"full gradient"``, ``"baseline"``, ``"greedy, in-sample"``, ``"greedy, held-out"``,
            ``"kind"`` or ``"component"``.
        name: Which one of the group; empty where there is but one.
        components: Number of components, for held-out choices the mean over splits; None where there are none.
        share: Share of the parameters, likewise.
        accuracy: Share of queries whose true source is strictly above every other candidate.
        mrr: Mean reciprocal rank.
        recall: Recall@k by k.
        accuracy_interval: 95 % confidence interval; None for chance, which is exact.
        mrr_interval: Likewise.
        recall_intervals: Likewise, by k; empty for chance.
    """

    setting: str
    group: str
    name: str
    components: float | None
    share: float | None
    accuracy: float
    mrr: float
    recall: Mapping[int, float]
    accuracy_interval: Interval | None = None
    mrr_interval: Interval | None = None
    recall_intervals: Mapping[int, Interval] = field(default_factory=dict)

    @property
    def measures(self) -> dict[str, tuple[float, Interval | None]]:
        """Value and interval of ``accuracy``, ``mrr`` and each ``recall@k``."""
        recall = {f"recall@{k}": (value, self.recall_intervals.get(k)) for k, value in self.recall.items()}
        return {"accuracy": (self.accuracy, self.accuracy_interval), "mrr": (self.mrr, self.mrr_interval), **recall}

    def to_dict(self) -> dict[str, Any]:
        """Flat: an interval as two numbers, such as ``accuracy_low`` and ``accuracy_high``."""
        row: dict[str, Any] = {key: getattr(self, key) for key in ("setting", "group", "name", "components", "share")}
        for key, (value, interval) in self.measures.items():
            row[key] = value
            row[f"{key}_low"], row[f"{key}_high"] = interval or (None, None)
        return row


@dataclass(frozen=True)
class RetrievalReport:
    """What `evaluate_retrieval` found; printed, it is `table`.

    Attributes:
        lines: Setting by setting: chance, full gradient, baselines, greedy choices, kinds, single components.
        choices: Path, splits and frequencies of the greedy choice by setting.
    """

    lines: tuple[RetrievalLine, ...]
    choices: Mapping[str, ComponentCrossValidation]

    def __str__(self) -> str:
        return self.table()

    def line(self, group: str, name: str = "", setting: str | None = None) -> RetrievalLine:
        """One line, by its group, its name in the group, and its setting where there are several.

        Raises:
            ValueError: If there is none or more than one.
        """
        found = [line for line in self.lines if (line.group, line.name) == (group, name)]
        found = [line for line in found if setting in (None, line.setting)]
        if len(found) != 1:
            known = list(dict.fromkeys((line.group, line.name, line.setting) for line in self.lines))
            raise ValueError(
                f"`RetrievalReport.line({group!r}, {name!r}, setting={setting!r})`: expected one line, found "
                f"{len(found)} among {known[:12]}."
            )
        return found[0]

    def rows(self) -> list[dict[str, Any]]:
        """Every line as a flat dict, as a data frame takes them."""
        return [line.to_dict() for line in self.lines]

    def table(self, singles: int = 3) -> str:
        """A table of text, with the most accurate single components of each setting.

        The best of many is chosen on the queries of the table and flatters itself, as greedy, in-sample does.

        Args:
            singles: Number of single components to show.
        """
        shown: list[RetrievalLine] = []
        for setting in self.choices:
            own = [line for line in self.lines if line.setting == setting]
            alone = [line for line in own if line.group == "component"]
            shown += [line for line in own if line.group != "component"]
            shown += sorted(alone, key=lambda line: -line.accuracy)[:singles]  # stable: ties in the model's order
        head = ["setting", "what", "components", "share", *shown[0].measures]
        return _aligned([head, *map(_cells, shown)])


def _cells(line: RetrievalLine) -> list[str]:
    return [
        line.setting,
        f"{line.group}: {line.name}" if line.name else line.group,
        "-" if line.components is None else f"{line.components:.4g}",
        "-" if line.share is None else f"{100 * line.share:.3g} %",
        *(_measured(value, interval) for value, interval in line.measures.values()),
    ]


def _measured(value: float, interval: Interval | None) -> str:
    return f"{value:.3f}" if interval is None else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = "-|-".join("-" * width for width in widths)
    return "\n".join(line.rstrip() for line in [padded[0], rule, *padded[1:]])
