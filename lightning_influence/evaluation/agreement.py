"""Estimates against what retraining measured: rank correlations with intervals ([IA] section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Id
from lightning_influence.evaluation.text_table import aligned, number
from lightning_influence.metrics.intervals import Interval
from lightning_influence.metrics.rank_agreement import MEASURES, percentile_interval, resampled


@dataclass(frozen=True)
class AgreementLine:
    """How well one estimator agrees with retraining.

    Attributes:
        name: Of the estimator.
        measures: ``spearman``, ``kendall`` and ``mae`` over groups, or ``lds``.
        intervals: 95 % bootstrap intervals of the same.
        per_target: Of the LDS, the rank correlation of each target; else empty.
    """

    name: str
    measures: Mapping[str, float]
    intervals: Mapping[str, Interval]
    per_target: Mapping[Id, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Flat: an interval as two numbers, such as ``spearman_low`` and ``spearman_high``."""
        row: dict[str, Any] = {"name": self.name}
        for key, value in self.measures.items():
            row[key] = value
            row[f"{key}_low"], row[f"{key}_high"] = self.intervals[key]
        return row


@dataclass(frozen=True)
class AgreementReport:
    """Lines of several estimators; printed, it is `table`.

    Attributes:
        lines: In the order in which the estimators were given.
        cases: Number of groups or subsets.
    """

    lines: tuple[AgreementLine, ...]
    cases: int

    def __str__(self) -> str:
        return self.table()

    def line(self, name: str) -> AgreementLine:
        """The line of one estimator.

        Raises:
            ValueError: If there is none of that name.
        """
        found = {line.name: line for line in self.lines}
        if name not in found:
            raise ValueError(f"`AgreementReport.line({name!r})`: expected one of {list(found)}.")
        return found[name]

    def rows(self) -> list[dict[str, Any]]:
        """Every line as a flat dict, as a data frame takes them."""
        return [line.to_dict() for line in self.lines]

    def table(self) -> str:
        """A table of text."""
        keys = list(self.lines[0].measures)
        body = [[line.name, *(number(line.measures[k], line.intervals[k]) for k in keys)] for line in self.lines]
        return aligned([["estimator", *keys], *body])


def group_agreement(
    estimates: Tensor | Mapping[str, Tensor], measured: Tensor, *, seed: int = 0, resamples: int = 1000
) -> AgreementReport:
    """Spearman's and Kendall's rank correlation and the mean absolute error over groups.

    Intervals draw groups again and again, the same for all estimators. They do not hold what the retraining is
    uncertain by. The mean absolute error has a meaning only for estimates in units of the loss.

    Args:
        estimates: Predicted change [g] of the target loss for each group, of one estimator or of several by name.
        measured: What retraining gave, [g].
        seed: Of the draws.
        resamples: Number of draws.

    Raises:
        ValueError: If there are fewer than two groups, shapes differ, or a number is NaN (the estimator is named).

    >>> report = group_agreement({"F": torch.tensor([1.0, 2.0, 3.0])}, torch.tensor([1.0, 3.0, 2.0]))
    >>> report.line("F").measures["spearman"]
    0.5
    """
    named = check_estimates("group_agreement", estimates, tuple(measured.shape))
    lines = []
    for name, values in named.items():
        found = {key: float(measure(values, measured)) for key, measure in MEASURES.items()}
        draws = {key: resampled(measure, values, measured, seed, resamples) for key, measure in MEASURES.items()}
        lines.append(AgreementLine(name, found, {key: percentile_interval(draw) for key, draw in draws.items()}))
    return AgreementReport(tuple(lines), len(measured))


def agreement_gain(
    better: Tensor, other: Tensor, measured: Tensor, *, seed: int = 0, resamples: int = 1000
) -> tuple[float, Interval]:
    """Spearman of one estimator minus that of another on the same groups, with the interval over the same draws.

    Args:
        better: Estimates [g].
        other: Estimates [g].
        measured: What retraining gave, [g].
        seed: Of the draws.
        resamples: Number of draws.

    Raises:
        ValueError: As `group_agreement`.
    """
    check_estimates("agreement_gain", {"better": better, "other": other}, tuple(measured.shape))
    measure = MEASURES["spearman"]
    both = [resampled(measure, values, measured, seed, resamples) for values in (better, other)]
    gain = float(measure(better, measured) - measure(other, measured))
    return gain, percentile_interval(both[0] - both[1])


def check_estimates(
    call: str, estimates: Tensor | Mapping[str, Tensor], shape: tuple[int, ...], name: str = "estimates"
) -> dict[str, Tensor]:
    """Estimates by name, float64 on the CPU, one alone as ``estimates``.

    Raises:
        ValueError: If there is none, one is of another shape than what was measured, or holds NaN.
    """
    given = dict(estimates) if isinstance(estimates, Mapping) else {name: estimates}
    if not given:
        raise ValueError(f"`{call}({name})`: expected at least one estimator.")
    found = {}
    for key, values in given.items():
        table = torch.as_tensor(values).detach().cpu().double()
        if tuple(table.shape) != shape or len(shape) != 1 or shape[0] < 2:
            raise ValueError(
                f"`{call}({name})`: {key!r} has shape {list(table.shape)}, what was measured {list(shape)}; expected "
                "one number for each of at least two groups."
            )
        if table.isnan().any():
            rows = table.isnan().nonzero().flatten().tolist()
            raise ValueError(f"`{call}({name})`: {key!r} is NaN for groups {rows[:8]}; expected numbers.")
        found[key] = table
    return found
