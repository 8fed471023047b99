"""Target loss after training on selections of several sizes, against a baseline ([IA] section 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from lightning_influence.estimators.factors import Id
from lightning_influence.evaluation.retraining import Job, Retraining, plain_ids, seed_numbers
from lightning_influence.evaluation.text_table import aligned, number
from lightning_influence.metrics.intervals import Interval, student_interval
from lightning_influence.selection.selection import Selection

Chosen: TypeAlias = Selection | Sequence[Id] | Callable[[int, int], Sequence[Id]]

_CALL = "selection_curves"


@dataclass(frozen=True)
class CurvePoint:
    """One method at one size.

    Attributes:
        method: Its name.
        size: Rows trained on.
        losses: Target loss for each seed.
        mean: Their mean.
        interval: Its 95 % interval by Student's t; infinite for one seed.
        gain: Mean over the seeds of the loss minus the baseline's at the same size and seed, < 0: better; None for the
            baseline.
        gain_interval: Its 95 % interval.
    """

    method: str
    size: int
    losses: tuple[float, ...]
    mean: float
    interval: Interval
    gain: float | None
    gain_interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """Flat: an interval as two numbers."""
        row: dict[str, Any] = {key: getattr(self, key) for key in ("method", "size", "mean", "gain")}
        row["low"], row["high"] = self.interval
        row["gain_low"], row["gain_high"] = self.gain_interval or (None, None)
        return row


@dataclass(frozen=True)
class SelectionCurves:
    """What `selection_curves` measured; printed, it is `table`.

    Attributes:
        points: Method by method, sizes ascending.
        baseline: Name of the method that the others are compared with.
        seeds: Seeds of the trainings.
    """

    points: tuple[CurvePoint, ...]
    baseline: str
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        return self.table()

    @property
    def methods(self) -> tuple[str, ...]:
        """Names in their order."""
        return tuple(dict.fromkeys(point.method for point in self.points))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(dict.fromkeys(point.size for point in self.points))

    def point(self, method: str, size: int) -> CurvePoint:
        """One method at one size.

        Raises:
            ValueError: If there is none.
        """
        for point in self.points:
            if (point.method, point.size) == (method, size):
                return point
        raise ValueError(
            f"`SelectionCurves.point({method!r}, {size!r})`: expected one of {list(self.methods)} and {self.sizes}."
        )

    def rows(self) -> list[dict[str, Any]]:
        """Every point as a flat dict, as a data frame takes them."""
        return [point.to_dict() for point in self.points]

    def table(self) -> str:
        """A table of text: a line for each method, a column for each size, and the difference to the baseline."""
        head = ["target loss", *(f"{size} rows" for size in self.sizes)]
        head += [f"minus {self.baseline}, {size} rows" for size in self.sizes]
        body = []
        for method in self.methods:
            own = [self.point(method, size) for size in self.sizes]
            cells = [number(point.mean, point.interval) for point in own]
            body.append([method, *cells, *(number(point.gain, point.gain_interval) for point in own)])
        return aligned([head, *body])


def selection_curves(
    retraining: Retraining,
    methods: Mapping[str, Chosen],
    sizes: Sequence[int],
    seeds: int | Sequence[int] = 3,
    *,
    baseline: str = "random",
) -> SelectionCurves:
    """Train on what each method chooses, at every size and with every seed.

    Compare at equal steps: with equal epochs small selections are under-trained, and every difference is noise.

    Args:
        retraining: How to train, and where to keep what was found. Several losses are averaged.
        methods: By name a `Selection` or ids, whose first k are the choice of k, best first; or a function of
            (size, seed), such as a rule that draws anew.
        sizes: Numbers of rows.
        seeds: Seeds, or their number.
        baseline: Name of the method to compare with, seed by seed.

    Raises:
        ValueError: If the baseline is no method, a size is not an int >= 1 or larger than a selection, or a method
            gives another number of rows (before any training); and as `Retraining.run`.

    >>> retraining = Retraining(lambda ids, seed: seed - sum(ids), progress=False)
    >>> found = selection_curves(retraining, {"top": [9, 8, 7], "random": [1, 2, 3]}, [1, 2], seeds=2)
    >>> found.point("top", 2).mean, found.point("top", 2).gain
    (-16.5, -14.0)
    """
    numbers, ascending = seed_numbers(_CALL, seeds), sorted(set(sizes))
    if baseline not in methods:
        raise ValueError(f"`{_CALL}(baseline={baseline!r})`: expected the name of a method among {list(methods)}.")
    if not ascending or any(type(size) is not int or size < 1 for size in ascending):
        raise ValueError(f"`{_CALL}(sizes={list(sizes)})`: expected ints >= 1.")
    jobs: list[Job] = [
        (_choice(name, chosen, size, seed), seed)
        for name, chosen in methods.items()
        for size in ascending
        for seed in numbers
    ]
    losses = retraining.run(jobs).mean(1).reshape(len(methods), len(ascending), len(numbers))
    reference = losses[list(methods).index(baseline)]
    points = [
        _point(name, size, losses[row, column], None if name == baseline else reference[column])
        for row, name in enumerate(methods)
        for column, size in enumerate(ascending)
    ]
    return SelectionCurves(tuple(points), baseline, tuple(numbers))


def _choice(name: str, chosen: Chosen, size: int, seed: int) -> tuple[Id, ...]:
    if isinstance(chosen, Selection):
        ids = chosen.ids[:size]
    else:
        ids = plain_ids(chosen(size, seed) if callable(chosen) else chosen[:size])
    if len(ids) != size:
        raise ValueError(f"`{_CALL}(methods)`: {name!r} has {len(ids)} rows where {size} were asked for.")
    return ids


def _point(method: str, size: int, losses: Tensor, reference: Tensor | None) -> CurvePoint:
    gains = None if reference is None else losses - reference
    return CurvePoint(
        method=method,
        size=size,
        losses=tuple(losses.tolist()),
        mean=float(losses.mean()),
        interval=student_interval(losses),
        gain=None if gains is None else float(gains.mean()),
        gain_interval=None if gains is None else student_interval(gains),
    )
