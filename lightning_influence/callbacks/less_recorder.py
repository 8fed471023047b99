"""What a step of Adam on each training example would do for the queries, at every checkpoint of a warm-up."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_influence.callbacks.base import Recorder
from lightning_influence.callbacks.example_shares import joined_columns, own_part, read_as_training, weights_label
from lightning_influence.callbacks.mean_rate import MeanRate
from lightning_influence.callbacks.preconditions import training_data
from lightning_influence.callbacks.query_check import check_finite
from lightning_influence.callbacks.recording import Recording
from lightning_influence.capture.component import Component
from lightning_influence.capture.data_fingerprint import data_fingerprint
from lightning_influence.capture.examples import TRAIN, ExampleLoader
from lightning_influence.capture.losses import ExampleLoss
from lightning_influence.curvature.adam import AdamMoments, Variant, check_optimizers, check_variant
from lightning_influence.estimators.adam_dot import AdamDot, as_trained, less_projection, save_moments
from lightning_influence.estimators.base import check_supervised
from lightning_influence.estimators.gradient_dot import GradientDot
from lightning_influence.estimators.less import RATE_FILE
from lightning_influence.estimators.scores import Scores
from lightning_influence.projections.base import Projection
from lightning_influence.store import Store


class LESSRecorder(Recorder):
    """Records `AdamDot` of queries and training examples with the moments that the Trainer's optimizers hold.

    The recipe of LESS (Xia et al. 2024) is a warm-up with LoRA on a random 5 % of the pool, a checkpoint an epoch, and
    the scores of the whole pool at each::

        recorder = LESSRecorder(targets, train=pool, components="lora", when="checkpoint")
        L.Trainer(max_epochs=4, callbacks=[recorder]).fit(model, DataLoader(Subset(pool, rows), ...))
        scores = less_scores(recorder.records)

    Each recording is a `Store` with the `Scores` [q, n] (ids are positions), the mean learning rate of the steps since
    the recording before it, and the moments (`load_moments`), which with the checkpoint's weights score other data
    later. The moments are found by the identity of the parameters.

    Args:
        queries: DataLoader or map-style dataset of the q examples whose loss matters. A dataset is collated, and put
            in batches, as the training data is.
        train: DataLoader or dataset of the n examples to choose from; None takes the Trainer's training data, or the
            pool of its `DataSelector`.
        projection: As in `AdamDot`; None for 8192 dimensions by random signs.
        variant: ``"less"`` as in the paper, ``"less_repo"`` as in the authors' code; see `AdamMoments.direction`.
        **options: Those of `Recorder`: when, dirpath, components, loss, batch_size, keep, name. Without a loss that of
            language models is the mean over an example's tokens, which is what a batch of one is trained on.

    Raises:
        ValueError: If queries or train have no positions, or the variant is none; when the training begins, if an
            optimizer keeps no Adam moments of the components (they are named).
    """

    default_name: ClassVar[str] = "less"

    def __init__(
        self,
        queries: Any,
        *,
        train: Any = None,
        projection: Projection | None = None,
        variant: Variant = "less",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_variant(type(self).__name__, variant)
        for name, data in (("queries", queries), ("train", train)):
            try:
                if data is not None or name == "queries":
                    ExampleLoader(data)
            except ValueError as error:
                raise ValueError(f"`{type(self).__name__}({name}={type(data).__name__})`: {error}") from error
        self.queries = queries
        self.train = train
        self.projection = projection
        self.variant: Variant = variant
        self._rate = MeanRate()

    # -- the learning rates of the steps, and how far they were counted when the run is killed

    def state_dict(self) -> dict[str, Any]:
        """Where the recordings are, and the rates of the steps since the last."""
        return {**super().state_dict(), "rate": self._rate.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run."""
        super().load_state_dict(state_dict)
        self._rate.load(state_dict["rate"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder; forget the steps of another fit."""
        super().on_fit_start(trainer, pl_module)
        if not self._restored:
            self._rate.clear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the first examples; steps before a recording that is there already do not count for the next."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step in {record.step for record in self.records}:
            self._rate.clear()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the learning rate of the step."""
        self._rate.note(optimizer)

    # -- work

    def check(self, recording: Recording) -> None:
        """Look at the optimizers and every query, and score one training example with the moments of a first step."""
        train, queries = self._train(recording), self._queries(recording)
        components = self._components(recording)
        check_optimizers(recording.model, components, recording.trainer.optimizers)
        self._rate.watch(recording.model.get_parameter(name) for c in components for name in c.parameters)
        self.examine(recording, recording.examples(train), recording.examples(queries))
        if self.trained_reduction.startswith("mean squared error"):
            rank_zero_warn(
                f"{self.name}: the loss recorded is {self._loss(recording, recording.examples(queries)).reduction}, "
                f"training_step's is {self.trained_reduction}; a step of Adam depends on the size of gradients. "
                "Expected loss= with the loss of one example as training_step would return it for a batch of one."
            )
        loss = self._loss(recording, recording.examples(queries))
        check_supervised(recording.model, recording.examples(queries), loss)
        own = own_part(recording, queries)
        if own is not None:
            check_finite(recording, recording.examples(own), loss)
        fresh = AdamMoments.fresh(recording.model, components)
        one, first = (ExampleLoader(data, indices=data.ids[:1]) for data in (queries, train))
        self._estimator(recording, one, fresh).score(recording.examples(one), recording.examples(first))

    def record(self, recording: Recording) -> None:
        """Score this rank's part of the training examples; rank 0 writes."""
        train, queries = self._train(recording), self._queries(recording)
        components = self._components(recording)
        moments = AdamMoments.from_optimizers(recording.model, components, recording.trainer.optimizers)
        parts = recording.on_each_rank(lambda: self._score(recording, own_part(recording, train), queries, moments))
        if recording.is_writer:
            scores = joined_columns(parts, train.ids).at(weights_label(recording))
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
                queries=data_fingerprint(queries.dataset),
            )
            scores.save(store)
            store.write_json(RATE_FILE, {"mean": self._rate.mean, "steps": self._rate.count})
            save_moments(store, moments)
        self._rate.clear()

    def _score(
        self, recording: Recording, train: ExampleLoader | None, queries: ExampleLoader, moments: AdamMoments
    ) -> Scores | None:
        if train is None:
            return None
        with recording.progress(2 * len(queries) + 2 * len(train)) as advance:
            left, right = (recording.examples(data, advance=advance) for data in (queries, train))
            return self._estimator(recording, queries, moments).score(left, right)

    def _estimator(self, recording: Recording, queries: ExampleLoader, moments: AdamMoments) -> AdamDot:
        components = self._components(recording)
        if self.projection is None or not self.projection.sizes:  # once: its random numbers are kept between recordings
            self.projection = less_projection(self.projection, components)
        return AdamDot(
            recording.model,
            moments,
            self.projection,
            self._loss(recording, recording.examples(queries)),
            components,
            variant=self.variant,
            batch_size=self.batch_size,
            progress=False,
        )

    def _loss(self, recording: Recording, queries: ExampleLoader) -> ExampleLoss:
        """As it is trained on, in the precision of the training."""
        found: Any = self.settled_loss
        if self.loss is None and isinstance(found, ExampleLoss):
            return recording.in_precision(as_trained(found))
        return recording.loss(queries, found)

    def _components(self, recording: Recording) -> list[Component]:
        return GradientDot(recording.model, components=self.components).components

    def _train(self, recording: Recording) -> ExampleLoader:
        data = training_data(self._call(), recording.trainer) if self.train is None else self.train
        return read_as_training(self._call(), recording.trainer, data, self.train, self.batch_size, TRAIN)

    def _queries(self, recording: Recording) -> ExampleLoader:
        call, trainer = self._call(), recording.trainer
        return read_as_training(call, trainer, self.queries, self.train, self.batch_size, "queries")
