"""How much the gradients of training examples and queries agree, at every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_influence.callbacks import candidate_dots, learning_rates
from lightning_influence.callbacks.base import Recorder
from lightning_influence.callbacks.candidate_dots import CandidateDots
from lightning_influence.callbacks.example_shares import joined_columns, own_part, read_as_training, weights_label
from lightning_influence.callbacks.learning_rates import LearningRateWatch
from lightning_influence.callbacks.preconditions import training_data
from lightning_influence.callbacks.query_check import check_finite, texts_of
from lightning_influence.callbacks.recording import Recording
from lightning_influence.capture.data_fingerprint import data_fingerprint
from lightning_influence.capture.examples import TRAIN, ExampleLoader
from lightning_influence.estimators.base import check_supervised
from lightning_influence.estimators.component_dots import ComponentDots
from lightning_influence.estimators.gradient_dot import GradientDot
from lightning_influence.estimators.pair_inputs import Side, checked_pairs, positions
from lightning_influence.estimators.scores import Scores
from lightning_influence.filters.bm25 import BM25Filter
from lightning_influence.store import Store


class GradientDotRecorder(Recorder):
    """Records `GradientDot` of queries and training examples, by component: score > 0, a step on it helps the query.

    Each recording is a `Store`. Without candidates every query meets every training example::

        store = Store.open(recorder.records[-1].path)
        scores = Scores.load(store)                  # values [c, q, n], ids are positions

    With candidates only these are compared, at about the cost of passing each example once (`GradientDot.pairs`), and
    self-products come along, so that cosines over any components follow::

        dots = ComponentDots.load(store)             # dots [c, p], query_squares [c, q], train_squares [c, n]
        store.read_json("candidates")                # [q, k] positions

    A run that is killed while it records such pairs goes on from where it stopped when it is resumed from the
    checkpoint. Both kinds hold the learning rate of each component, as `TracIn` needs it::

        store.read_json("learning_rates")            # {"next": {name: rate}, "last": ..., ...}, see `LearningRates`

    Args:
        queries: DataLoader or map-style dataset of the q examples whose loss matters. A dataset is collated, and put
            in batches, as the training data is.
        candidates: None for all pairs; for each query the positions of the training examples to compare it with;
            or their number k, which are then found by shared words (`BM25Filter`) before training.
        text: The text of an example, for k candidates: a field of the dataset's rows or a function of a row.
        train: DataLoader or dataset of the training examples; None takes the Trainer's, or the pool of its
            `DataSelector`.
        per_component: Without candidates: whether to keep components apart, or only their sum [q, n].
        normalise: Without candidates: whether to record cosines of the whole gradients instead of inner products.
        memory_budget: Bytes for gradients that are kept.
        batch_positions: With candidates: positions (tokens) of a batch, padding included.
        **options: Those of `Recorder`: when, dirpath, components, loss, batch_size, keep, name.

    Raises:
        ValueError: If queries or train have no positions, candidates are neither of the above, k is given without a
            text, or an argument is given that has no meaning with candidates.
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
        memory_budget: int = 2 * 1024**3,
        batch_positions: int = 1024,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.queries = queries
        self.candidates = candidates
        self.text = text
        self.train = train
        self.per_component = per_component
        self.normalise = normalise
        self.memory_budget = memory_budget
        self.batch_positions = batch_positions
        self._found: list[list[int]] | None = None
        self._rates = LearningRateWatch()
        self._check_arguments()

    def _check_arguments(self) -> None:
        for name, data in (("queries", self.queries), ("train", self.train)):
            try:
                if data is not None or name == "queries":
                    ExampleLoader(data)
            except ValueError as error:
                raise ValueError(f"`{type(self).__name__}({name}={type(data).__name__})`: {error}") from error
        for name in ("memory_budget", "batch_positions"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{self._call(**{name: value})}`: expected an int >= 1.")
        self._check_candidates()

    def _check_candidates(self) -> None:
        given: Any = self.candidates
        if isinstance(given, torch.Tensor):
            given = self.candidates = given.tolist()
        if given is None:
            return
        if isinstance(given, int) and not isinstance(given, bool):
            if given < 1 or self.text is None:
                raise ValueError(
                    f"`{self._call(candidates=given, text=self.text)}`: expected k >= 1 and the text of an example, "
                    "as a field of the rows or a function of a row."
                )
        elif not isinstance(given, Sequence) or not all(map(_is_row, given)):
            raise ValueError(
                f"`{type(self).__name__}(candidates={type(given).__name__})`: expected for each query a list of "
                "positions, the number k of candidates to find, or None for all pairs."
            )
        if self.normalise or not self.per_component:
            wrong = {"normalise": True} if self.normalise else {"per_component": False}
            raise ValueError(
                f"`{self._call(candidates='...', **wrong)}`: with candidates the products of each component are kept, "
                "with those of every example with itself. Leave it out; `ComponentDots.cosine()` and `.total()` give "
                "cosines and sums, over all components or some."
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the candidates that were found in another fit's data, and its steps."""
        super().setup(trainer, pl_module, stage)
        self._found = None
        self._rates.start()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the learning rates of the step."""
        self._rates.note(optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the last weights; what was kept to go on from is of no use any more."""
        super().on_train_end(trainer, pl_module)
        if self.root is not None:
            candidate_dots.sweep(self.root)

    def check(self, recording: Recording) -> None:
        """Find the candidates, look at every query, and compare one with one training example."""
        train, queries = self._train(recording), self._queries(recording)
        self._found = self._candidates(train, queries)
        loss = self.examine(recording, recording.examples(train), recording.examples(queries))
        check_supervised(recording.model, recording.examples(queries), loss)
        own = own_part(recording, queries)
        if own is not None:
            check_finite(recording, recording.examples(own), loss)
        self._try_out(recording, train, queries)
        rates = self._rates.of(recording.trainer, recording.model, self._estimator(recording, queries).components)
        if rates.several:
            rank_zero_warn(
                f"{self.name}: parameters of {len(rates.several)} components have different learning rates, such as "
                f"{dict(list(rates.several.items())[:3])}; the mean by number of parameters is recorded for each."
            )

    def record(self, recording: Recording) -> None:
        """Compute this rank's part; rank 0 writes."""
        train, queries = self._train(recording), self._queries(recording)
        if self._found is not None:
            self._record_candidates(recording, train, queries)
            return
        parts = recording.on_each_rank(lambda: self._score(recording, own_part(recording, train), queries))
        if recording.is_writer:
            scores = joined_columns(parts, train.ids)
            store = self._store(recording, scores, train, queries)
            scores.save(store)

    def _record_candidates(self, recording: Recording, train: ExampleLoader, queries: ExampleLoader) -> None:
        assert self._found is not None
        job = CandidateDots(
            recording=recording,
            estimator=lambda own: self._estimator(recording, own),
            queries=queries,
            train=train,
            candidates=self._found,
            batch_positions=self.batch_positions,
        )
        dots = job.collect().at(weights_label(recording))
        if recording.is_writer:
            store = self._store(recording, dots, train, queries)
            store.write_json("candidates", self._found)
            dots.save(store)
            job.clear()

    def _try_out(self, recording: Recording, train: ExampleLoader, queries: ExampleLoader) -> None:
        """One query with one training example; with candidates the longest such pair, to see that it fits in memory."""
        if self._found is None:
            self._score(recording, ExampleLoader(train, indices=train.ids[:1]), queries, queries.ids[:1])
            return
        pairs, ids = checked_pairs(self._call(candidates="..."), self._found, queries, train)
        sides = [recording.examples(queries), recording.examples(ExampleLoader(train, indices=ids))]
        estimator = self._estimator(recording, sides[0])
        left, right = (Side(side, estimator.loss).lengths() for side in sides)  # type: ignore[arg-type]
        a, b = max(pairs, key=lambda pair: left[pair[0]] + right[pair[1]])
        query = ExampleLoader(sides[0], indices=[queries.ids[a]])
        estimator.pairs(query, sides[1], [[ids[b]]], batch_positions=self.batch_positions)

    def _train(self, recording: Recording) -> ExampleLoader:
        data = training_data(self._call(), recording.trainer) if self.train is None else self.train
        return self._loader(recording, data, TRAIN)

    def _queries(self, recording: Recording) -> ExampleLoader:
        return self._loader(recording, self.queries, "queries")

    def _loader(self, recording: Recording, data: Any, what: str) -> ExampleLoader:
        """A dataset without a loader is read as the training data is: with its collate function and batch size."""
        return read_as_training(self._call(), recording.trainer, data, self.train, self.batch_size, what)

    def _candidates(self, train: ExampleLoader, queries: ExampleLoader) -> list[list[int]] | None:
        if self.candidates is None:
            return None
        if isinstance(self.candidates, int):
            call = self._call(text=self.text)
            assert self.text is not None
            pool, asked = (texts_of(loader, self.text, call) for loader in (train, queries))
            rows = BM25Filter(pool).candidates(asked, self.candidates)
            return [[train.ids[k] for k in row] for row in rows.tolist()]
        found = [[int(k) for k in row] for row in self.candidates]
        checked_pairs(self._call(candidates="..."), found, queries, train)
        return found

    def _estimator(self, recording: Recording, queries: ExampleLoader) -> GradientDot:
        """For queries as ``training_step`` gets them."""
        loss = recording.loss(queries, self.settled_loss)
        batch_size = self.batch_size
        if self._found is not None and batch_size is None:
            _, batch = next(iter(queries))
            if loss.position_mask(batch) is None and positions(batch) == 1:  # nothing but the number bounds a batch
                batch_size = queries.batch_size
        return GradientDot(
            recording.model,
            loss,
            self.components,
            normalise=self.normalise,
            batch_size=batch_size,
            memory_budget=self.memory_budget,
            progress=False,
        )

    def _score(
        self,
        recording: Recording,
        train: ExampleLoader | None,
        queries: ExampleLoader,
        indices: Sequence[int] | None = None,
    ) -> Scores | None:
        """Of all queries, or some, with some training examples; None without any."""
        if train is None:
            return None
        left = ExampleLoader(queries, indices=indices)
        with recording.progress(2 * len(left) + len(train)) as advance:
            left, right = recording.examples(left, advance=advance), recording.examples(train, advance=advance)
            estimator = self._estimator(recording, left)
            scores = estimator.score(left, right, per_component=self.per_component)
        return scores.at(weights_label(recording))

    def _store(
        self, recording: Recording, found: Scores | ComponentDots, train: ExampleLoader, queries: ExampleLoader
    ) -> Store:
        components = GradientDot(recording.model, components=self.components).components
        store = Store.create(
            recording.folder,
            recording.model,
            components,
            formula=found.formula,
            reduction=found.reduction,
            trained_reduction=self.trained_reduction,
            precision=str(recording.trainer.precision),
            step=recording.step,
            train=data_fingerprint(train.dataset),
            queries=data_fingerprint(queries.dataset),
        )
        rates = self._rates.of(recording.trainer, recording.model, components)
        store.write_json(learning_rates.FILE, rates.to_json())
        return store


def _is_row(row: Any) -> bool:
    return isinstance(row, Sequence | torch.Tensor) and not isinstance(row, str)
