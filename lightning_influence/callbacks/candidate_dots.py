"""Products of queries with their candidates on several ranks, going on where a killed run stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lightning_influence.callbacks.recording import Recording
from lightning_influence.capture.data_fingerprint import data_fingerprint
from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.errors import StoreError
from lightning_influence.estimators.component_dots import ComponentDots
from lightning_influence.estimators.gradient_dot import GradientDot
from lightning_influence.store import Store

FOLDER = "unfinished"  # beside the recordings, and not among what is swept when a run begins


@dataclass(frozen=True)
class CandidateDots:
    """The products of one recording: every rank takes the queries that come round to it, with all their candidates.

    A rank keeps its numbers in a store of its own as they come. When the same weights are recorded again, as after a
    kill, it goes on from there. Where that store is of other weights, data or settings, it begins anew.

    Attributes:
        recording: The one under way.
        estimator: Makes the estimator for queries as ``training_step`` gets them.
        queries: All queries.
        train: All training examples.
        candidates: For each query the ids of training examples.
        batch_positions: Positions of a batch.
    """

    recording: Recording
    estimator: Callable[[ExampleLoader], GradientDot]
    queries: ExampleLoader
    train: ExampleLoader
    candidates: Sequence[Sequence[int]]
    batch_positions: int

    def collect(self) -> ComponentDots:
        """Those of all ranks, on every rank."""
        parts = self.recording.on_each_rank(self._own)
        return joined([part for part in parts if part is not None], self.queries.ids)

    def clear(self) -> None:
        """Delete what the ranks have kept of this step, once the joined numbers have been written."""
        shutil.rmtree(self._folder.parent, ignore_errors=True)
        with suppress(OSError):  # not empty, or gone
            self._folder.parent.parent.rmdir()

    def _own(self) -> ComponentDots | None:
        rank, size = self.recording.trainer.global_rank, self.recording.trainer.world_size
        rows = range(len(self.queries.ids))[rank::size]
        if not rows:
            return None
        queries = ExampleLoader(self.queries, indices=[self.queries.ids[k] for k in rows])
        queries, train = self.recording.examples(queries), self.recording.examples(self.train)
        candidates = [self.candidates[k] for k in rows]
        estimator = self.estimator(queries)

        def work() -> ComponentDots:
            store = self._store(estimator, queries, candidates)
            options: dict[str, Any] = {"batch_positions": self.batch_positions, "store": store}
            return estimator.pairs(queries, train, candidates, bar=self.recording.progress, **options)

        try:
            return work()
        except StoreError:  # of other weights or settings, planned by another version, or damaged: not worth keeping
            shutil.rmtree(self._folder, ignore_errors=True)
            return work()

    def _store(self, estimator: GradientDot, queries: ExampleLoader, candidates: Sequence[Sequence[int]]) -> Store:
        settings: dict[str, Any] = {
            "queries": data_fingerprint(queries.dataset),
            "train": data_fingerprint(self.train.dataset),
            "pairs": hashlib.sha256(json.dumps([queries.ids, candidates]).encode()).hexdigest(),
            "precision": str(self.recording.trainer.precision),
            "reduction": getattr(estimator.loss, "reduction", None),
            "memory_budget": estimator.memory_budget,
            "batch": [self.batch_positions, estimator.batch_size],
        }
        return Store.resume(self._folder, estimator.model, estimator.components, **settings)

    @property
    def _folder(self) -> Path:
        trainer = self.recording.trainer
        rank = f"rank={trainer.global_rank}-of-{trainer.world_size}"
        return self.recording.folder.parent / FOLDER / f"step={self.recording.step:08d}" / rank


def sweep(root: Path) -> None:
    """Delete what ranks have kept in a recorder's folder: the training is over, and will not come back to it."""
    shutil.rmtree(root / FOLDER, ignore_errors=True)


def joined(parts: Sequence[ComponentDots], query_ids: Sequence[int]) -> ComponentDots:
    """Products of different queries as those of one recording.

    Args:
        parts: Of different queries, with the same components; they may share training examples.
        query_ids: All queries, in the order that they shall have.
    """
    train_ids = sorted({int(name) for part in parts for name in part.train_ids})
    column = {name: k for k, name in enumerate(train_ids)}
    row = {name: k for k, name in enumerate(query_ids)}
    pairs, squares = [], torch.empty(len(parts[0].components), len(train_ids), dtype=parts[0].train_squares.dtype)
    for part in parts:
        places = [(row[int(part.query_ids[a])], column[int(part.train_ids[b])]) for a, b in part.pairs.tolist()]
        pairs.append(torch.tensor(places, dtype=torch.int64).reshape(-1, 2))
        squares[:, [column[int(name)] for name in part.train_ids]] = part.train_squares
    every = torch.cat(pairs)
    order = torch.argsort(every[:, 0], stable=True)  # within a query in the order of its candidates
    owners = torch.argsort(torch.tensor([row[int(name)] for part in parts for name in part.query_ids]))
    return replace(
        parts[0],
        query_ids=tuple(query_ids),
        train_ids=tuple(train_ids),
        pairs=every[order],
        dots=torch.cat([part.dots for part in parts], dim=1)[:, order],
        query_squares=torch.cat([part.query_squares for part in parts], dim=1)[:, owners],
        train_squares=squares,
    )
