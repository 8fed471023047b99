"""How much the gradients of training examples and queries agree, at every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_influence.callbacks.base import Recorder
from lightning_influence.callbacks.preconditions import training_data
from lightning_influence.callbacks.recording import Recording
from lightning_influence.capture.data_fingerprint import data_fingerprint
from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.estimators.gradient_dot import GradientDot
from lightning_influence.estimators.scores import Scores
from lightning_influence.filters.bm25 import BM25Filter
from lightning_influence.store import Store


class GradientDotRecorder(Recorder):
    """Records `GradientDot` of queries and training examples, by component: score > 0, a step on it helps the query.

    Each recording is a `Store`::

        store = Store.open(recorder.records[-1].path)
        scores = Scores.load(store)                  # values [c, q, n], ids are positions
        store.read_json("candidates")                # [q, k] positions, when there are candidates

    With candidates, n is the number of different ones: a training example's gradient is formed once, and then
    compared with all queries.

    Args:
        queries: DataLoader or map-style dataset of the q examples whose loss matters.
        candidates: None for all pairs; for each query the positions of the training examples to compare it with;
            or their number k, which are then found by shared words (`BM25Filter`) before training.
        text: The text of an example, for k candidates: a field of the dataset's rows or a function of a row.
        train: DataLoader or dataset of the training examples; None takes the Trainer's, or the pool of its
            `DataSelector`.
        per_component: Whether to keep components apart, or only their sum [q, n].
        normalise: Whether to record cosines of the whole gradients instead of inner products.
        **options: Those of `Recorder`: when, dirpath, components, loss, batch_size, keep, name.

    Raises:
        ValueError: If candidates are neither of the above, or k is given without a text.
    """

    default_name: ClassVar[str] = "gradient_dot"

    def __init__(
        self,
        queries: Any,
        candidates: list[list[int]] | int | None = None,
        *,
        text: str | Callable[..., str] | None = None,
        train: Any = None,
        per_component: bool = True,
        normalise: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if isinstance(candidates, int) and (candidates < 1 or text is None):
            raise ValueError(
                f"`{self._call(candidates=candidates, text=text)}`: expected k >= 1 and the text of an example, "
                "as a field of the rows or a function of a row."
            )
        self.queries = queries
        self.candidates = candidates
        self.text = text
        self.train = train
        self.per_component = per_component
        self.normalise = normalise
        self._found: list[list[int]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the candidates that were found in another fit's data."""
        super().setup(trainer, pl_module, stage)
        self._found = None

    def check(self, recording: Recording) -> None:
        """Find the candidates, and compare one query with one training example."""
        train = self._train(recording)
        self._found = self._candidates(train)
        queries = recording.examples(ExampleLoader(self.queries, self.batch_size))
        self.examine(recording, recording.examples(train), queries)
        self._score(recording, train.ids[:1], ExampleLoader(self.queries).ids[:1])

    def record(self, recording: Recording) -> None:
        """Score this rank's part of the training examples; rank 0 writes."""
        train = self._train(recording)
        ids = train.ids if self._found is None else sorted({k for row in self._found for k in row})
        parts = recording.on_each_rank(lambda: self._score(recording, recording.shard(ids)))
        if recording.is_writer:
            self._save(recording, _joined(parts, ids), train)

    def _train(self, recording: Recording) -> ExampleLoader:
        data = training_data(self._call(), recording.trainer) if self.train is None else self.train
        return ExampleLoader(data, self.batch_size)

    def _candidates(self, train: ExampleLoader) -> list[list[int]] | None:
        queries = ExampleLoader(self.queries)
        if isinstance(self.candidates, int):
            texts = [self._texts(loader.dataset) for loader in (train, queries)]
            found: list[list[int]] = BM25Filter(texts[0]).candidates(texts[1], self.candidates).tolist()
            return found
        if self.candidates is None:
            return None
        rows = [[int(k) for k in row] for row in self.candidates]
        n, q = len(train.ids), len(queries.ids)
        if len(rows) != q or not all(rows) or not all(0 <= k < n for row in rows for k in row):
            raise ValueError(
                f"`{self._call(candidates='...')}`: expected for each of {q} queries at least one position from 0 to "
                f"{n - 1}, got {len(rows)} lists of {sorted({len(row) for row in rows})[:5]} positions."
            )
        return rows

    def _texts(self, dataset: Any) -> list[str]:
        field = self.text
        rows = (dataset[k] for k in range(len(dataset)))
        return [row[field] if isinstance(field, str) else field(row) for row in rows]  # type: ignore[misc]

    def _score(self, recording: Recording, ids: Sequence[int], queries: Sequence[int] | None = None) -> Scores:
        left, right = ExampleLoader(self.queries, self.batch_size, indices=queries), self._train(recording)
        right = ExampleLoader(right, indices=ids)
        with recording.progress(2 * len(left) + len(right)) as advance:
            left, right = recording.examples(left, advance=advance), recording.examples(right, advance=advance)
            loss = recording.loss(left, self.settled_loss)
            estimator = GradientDot(recording.model, loss, self.components, normalise=self.normalise, progress=False)
            scores = estimator.score(left, right, per_component=self.per_component)
        return scores.at(recording.checkpoint or f"step={recording.step}")

    def _save(self, recording: Recording, scores: Scores, train: ExampleLoader) -> None:
        components = GradientDot(recording.model, components=self.components).components
        store = Store.create(
            recording.folder,
            recording.model,
            components,
            formula=scores.formula,
            reduction=scores.reduction,
            trained_reduction=self.trained_reduction,
            precision=str(recording.trainer.precision),
            step=recording.step,
            train=data_fingerprint(train.dataset),
            queries=data_fingerprint(ExampleLoader(self.queries).dataset),
        )
        scores.save(store)
        if self._found is not None:
            store.write_json("candidates", self._found)


def _joined(parts: Sequence[Scores], ids: Sequence[int]) -> Scores:
    """The ranks' columns, in the order of the ids."""
    place = {name: k for k, name in enumerate(name for part in parts for name in part.train_ids)}
    values = torch.cat([part.values for part in parts], dim=-1)[..., [place[name] for name in ids]]
    return replace(parts[0], values=values, train_ids=tuple(ids))
