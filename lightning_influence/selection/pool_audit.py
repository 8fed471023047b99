"""Rows of a pool that a selection should not hide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_influence.capture import ExampleLoader, ExampleLoss
from lightning_influence.capture.batches import leaves
from lightning_influence.capture.example_digest import example_digest
from lightning_influence.capture.unfit import run_batch
from lightning_influence.curvature.base import loss_for


@dataclass(frozen=True)
class PoolAudit:
    """What stands out in a pool before it is used; ids are positions.

    Attributes:
        size: Number of rows.
        unsupervised: Rows without any target.
        duplicates: Rows that repeat an earlier one.
        leaked: Rows that are also in the target set.
        suspects: Rows with a number that is not finite, whose loss may be none.
        originals: The earlier row that each of the duplicates repeats.
    """

    size: int
    unsupervised: tuple[int, ...]
    duplicates: tuple[int, ...]
    leaked: tuple[int, ...]
    suspects: tuple[int, ...] = ()
    originals: tuple[int, ...] = field(default=(), compare=False)

    @property
    def remarks(self) -> list[str]:
        """A sentence about each kind of row that was found, with the first ids."""
        kinds = (
            (self.unsupervised, "have no supervised target and are left out"),
            (self.duplicates, "repeat an earlier row; interactions discount them, additive rules do not"),
            (self.leaked, "also stand in the target set, so the selection may only memorise the target"),
        )
        return [f"{len(ids)} of {self.size} pool rows {what} (ids {list(ids[:8])})." for ids, what in kinds if ids]


def audit_pool(
    model: nn.Module,
    pool: ExampleLoader,
    targets: ExampleLoader,
    loss: ExampleLoss | Callable[[nn.Module, Any], Tensor] | None = None,
    progress: bool = True,
) -> PoolAudit:
    """Read pool and targets once, without running the model."""
    found = loss_for(model, pool, loss)
    goals = {example_digest(targets.dataset[k]) for k in targets.ids} - {None}
    seen: dict[bytes, int] = {}
    unsupervised: list[int] = []
    duplicates: list[int] = []
    leaked: list[int] = []
    suspects: list[int] = []
    originals: list[int] = []
    for ids, batch in tqdm(pool, desc="checking the pool", delay=3, leave=False, disable=not progress):
        unsupervised += ids[run_batch(found.supervised, batch, ids, pool.what).cpu() == 0].tolist()
        for k in ids.tolist():
            row = pool.dataset[k]
            if not all(map(_finite, leaves(row))):
                suspects.append(k)
            digest = example_digest(row)
            if digest is None:
                continue
            if digest in seen:
                duplicates.append(k)
                originals.append(seen[digest])
            if digest in goals:
                leaked.append(k)
            seen.setdefault(digest, k)
    found_rows = (unsupervised, duplicates, leaked, suspects, originals)
    return PoolAudit(pool.num_examples, *map(tuple, found_rows))


def _finite(leaf: Any) -> bool:
    """False for a number that is not; what is no number is not looked at."""
    if isinstance(leaf, Tensor):
        return bool(torch.isfinite(leaf).all())
    if hasattr(leaf, "__array_interface__"):
        array = np.asarray(leaf)
        return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())
    return not isinstance(leaf, float) or math.isfinite(leaf)
