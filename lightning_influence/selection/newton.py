"""What ``rule="newton"`` means: the settings of a selection by the Newton step, apart from any pool."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from lightning_influence.selection.held_out_choice import FOLDS, check_folds

LANDMARKS = 2048  # at most by default: time and memory of the choice itself grow with them

FEW = 200  # targets that are shrunk by default: by 100 of digits networks were better or as good, by 300 not all


@dataclass(frozen=True)
class Newton:
    """Selection by the Newton step, whole: how rows are known, which are left out first, how far training fits them.

    ``rule="newton"`` of `DataSelector` and `select_training_data` is ``Newton()``. Rows are chosen by `NewtonGreedy` on
    the scores of a pool (`NewtonPool.scored`), by which its ridge is found too.

    Attributes:
        ridge: How far training fits a row. "random": the ridge that explains the targets from random selections of the
            budget's size (`NewtonPool.ridge`), for training that goes on until every row is fitted. "saturate": that
            or the smallest larger one at which the predicted gain lasts as long as the budget
            (`NewtonPool.saturating_rule`), for short training of an epoch or two, as instruction tuning is.
            "held-out": the one whose selections by some of the target examples explain the others best
            (`held_out_ridge`), which selects anew for each of 13 ridges and for each fold; what constraints ask for
            is not looked at there. A number > 0: itself, see `NewtonGreedy`.
        landmarks: Rows of the pool that are scored like targets, so that rows can be told apart in more directions
            than there are targets, and contradictions be seen: a number, or a share in (0, 1], rounded up; 0 for none;
            as many as there are rows leave nothing out. They are drawn at random by id, whatever is in them, so that
            another order of a data set, in which rows have other positions, has other landmarks unless all rows are.
            Their cost is that of as many more targets: their gradients are kept beside those of the targets, and once
            both exceed the estimator's ``memory_budget``, the pool is passed over again for each block of them.
            [rows, targets + landmarks] numbers in float64 are kept, and every pick takes time in proportion to them.
            None for as many as need neither another pass over the pool nor more than that memory for the numbers, and
            2048 at most: all rows of a pool of that size for models or adapters of a few hundred thousand parameters,
            hardly any where hundreds of millions are trained.
        screen: Whether rows that the others contradict, such as wrong labels, are left out first, as far as the
            budget and the constraints allow it (`NewtonPool.opposed`). None: unless the ridge is "saturate". How many
            was settled on pools with wrong labels and long training; pools for short training were not screened in
            anything that was measured.
        saturation: Of "saturate": the share of the first gains that the last ones shall still have, in (0, 1).
        folds: Of "held-out": parts of the target examples, each of which is held out once; from 2 to as many as there
            are targets.
        shrink: Whether the pool counts in the target loss as far as the targets may differ from it by chance
            (`pool_share`), so that few of them are not overfitted. None: by fewer than 200 targets, unless the ridge
            is "saturate", as for the screen. With 300 it was no better, and with wrong labels in the pool it was
            worse for 200 of 1000 digits. False suits few targets of one narrow kind better, such as a single class, and
            pools in which many labels are wrong in the same way: those are the pool's own mean.

    >>> Newton(ridge="saturate").screens
    False

    Raises:
        ValueError: If a word or number does not fit.
    """

    ridge: float | Literal["random", "saturate", "held-out"] = "random"
    landmarks: int | float | None = None
    screen: bool | None = None
    saturation: float = 0.05
    folds: int = FOLDS
    shrink: bool | None = None

    def __post_init__(self) -> None:
        if self.ridge not in ("random", "saturate", "held-out") and not _between(self.ridge, 0, math.inf):
            raise ValueError(
                f"`Newton(ridge={self.ridge!r})`: expected 'random', 'saturate', 'held-out' or a finite number > 0, "
                "such as 0.1."
            )
        if self.landmarks is not None and not _is_count_or_share(self.landmarks):
            raise ValueError(
                f"`Newton(landmarks={self.landmarks!r})`: expected a number of rows as an int >= 0, a share of the "
                f"pool in (0, 1], or None for what comes without another pass."
            )
        for name, word in (("screen", self.screen), ("shrink", self.shrink)):
            if type(word) not in (bool, type(None)):
                raise ValueError(f"`Newton({name}={word!r})`: expected True, False or None.")
        if not _between(self.saturation, 0, 1):
            raise ValueError(f"`Newton(saturation={self.saturation!r})`: expected a share in (0, 1), such as 0.05.")
        if type(self.folds) is not int or self.folds < 2:
            raise ValueError(f"`Newton(folds={self.folds!r})`: expected an int >= 2.")

    @property
    def screens(self) -> bool:
        """Whether rows that the others contradict are left out first."""
        return self.ridge != "saturate" if self.screen is None else self.screen

    def shrinks(self, targets: int) -> bool:
        """Whether the pool counts in the target loss, by so many target examples."""
        return self.ridge != "saturate" and targets < FEW if self.shrink is None else self.shrink

    def landmarks_of(self, rows: int, room: int = LANDMARKS, call: str = "Newton") -> int:
        """Number of landmarks in a pool.

        Args:
            rows: Of the pool.
            room: For landmarks that need no further pass and not too much memory.
            call: How the caller's code reads, for the error text.

        Raises:
            ValueError: If a number was given that is larger than the pool.
        """
        if self.landmarks is None:
            return min(LANDMARKS, rows, room)
        if isinstance(self.landmarks, float):
            return math.ceil(self.landmarks * rows - 1e-9)  # 0.07 * 100 is a little above 7
        if self.landmarks > rows:
            raise ValueError(
                f"`{call}(rule=Newton(landmarks={self.landmarks}))`: expected at most the {rows} rows of the pool. "
                "Pass 1.0 for all of them, or None for as many as come without another pass."
            )
        return int(self.landmarks)

    def check_targets(self, targets: int, call: str = "Newton") -> None:
        """Refuses to hold out parts of too few target examples.

        Args:
            targets: Number of examples that count.
            call: How the caller's code reads, for the error text.

        Raises:
            ValueError: If the ridge is "held-out" and there are fewer targets than folds.
        """
        if self.ridge == "held-out":
            check_folds(f"{call}(rule=Newton(folds={self.folds}))", self.folds, targets)


def _between(number: Any, low: float, high: float) -> bool:
    """Whether it is a number strictly between two others."""
    return not isinstance(number, bool) and isinstance(number, Real) and low < float(number) < high


def _is_count_or_share(number: Any) -> bool:
    if isinstance(number, float):
        return 0 < number <= 1
    return not isinstance(number, bool) and isinstance(number, Integral) and int(number) >= 0
