"""The random part of a pool that a warm-up model is trained on."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn

from lightning_influence.datamodule.chosen import Chosen
from lightning_influence.selection import Random
from lightning_influence.selection.budget import check_budget, resolve_budget


class WarmUp:
    """A uniform draw without replacement, the same for the same arguments everywhere.

    Args:
        part: A number of rows, or a share of the pool.
        seed: As in `Random`; the global generators are left alone.

    Attributes:
        rows: What was drawn, or read from a checkpoint; None before.

    Raises:
        ValueError: If an argument does not fit.
    """

    def __init__(self, part: int | float, seed: int) -> None:
        self.part = part
        self.rule = Random(seed)
        self.rows: Chosen | None = None
        self.check(None)

    def check(self, size: int | None) -> None:
        """Refuse what is no part of a pool, of which the size may not be known yet.

        Raises:
            ValueError: If it is neither a number of rows nor a share, or more than the pool has.
        """
        call = "DataSelector"
        try:
            check_budget(self.part, call) if size is None else resolve_budget(self.part, size, call)
        except ValueError as error:
            raise ValueError(str(error).replace(f"{call}(budget=", f"{call}(warmup=", 1)) from error

    def of(self, dataset: Any) -> Chosen:
        """The part of a dataset.

        Raises:
            ValueError: If it is more than there is, or the dataset is not the one that was drawn from before.
        """
        self.check(len(dataset))
        drawn = Chosen(self.rule.select(torch.zeros(len(dataset)), budget=self.part).positions)
        self.rows = (self.rows or drawn).found_in(dataset)
        if self.rows.ids != drawn.ids:
            rank_zero_warn(
                f"DataSelector(warmup={self.part}, seed={self.rule.seed}): the checkpoint was trained on other rows, "
                f"{len(self.rows.ids)} in number; the fit goes on with those."
            )
        return self.rows
