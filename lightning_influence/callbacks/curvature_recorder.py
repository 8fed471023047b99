"""The curvature of the loss on the training data, fitted while the model is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_influence.callbacks.base import Recorder, When
from lightning_influence.callbacks.preconditions import training_data
from lightning_influence.callbacks.recording import Recording
from lightning_influence.capture import ExampleLoader, ExampleLoss, GradientCapture
from lightning_influence.capture.data_fingerprint import data_fingerprint
from lightning_influence.curvature import EKFAC, Curvature
from lightning_influence.curvature.iterative import IterativeCurvature
from lightning_influence.store import Store
from lightning_influence.store.files import StoredDtype


class CurvatureRecorder(Recorder):
    """Fits a curvature on the training data, at the end of fit or at checkpoints, and keeps its factors.

    Each recording is a `Store` from which scores are computed later, with the same weights::

        InfluenceFunction.from_store(model, recorder.records[-1].path).score(queries, train)
        selector.select(model, store=recorder.records[-1].path)

    Args:
        curvature: A curvature with its settings, which itself stays unfitted; None for ``EKFAC()``.
        when: As in `Recorder`.
        train: DataLoader or dataset; None takes the Trainer's training data, or the pool of its `DataSelector`.
            Examples without a finite loss are an error: ``omit_nonfinite(model, data)`` leaves them out, the store
            tells which.
        dtype: ``"bfloat16"`` stores factors in half the room, as in `Store.write_curvature`.
        **options: Those of `Recorder`: dirpath, components, loss, batch_size, keep, name.

    Raises:
        ValueError: If the curvature is none, or leaves no factors behind, or an option is wrong.
    """

    default_name: ClassVar[str] = "curvature"

    def __init__(
        self,
        curvature: Curvature | None = None,
        when: When = "fit_end",
        *,
        train: Any = None,
        dtype: StoredDtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(when, **options)
        if not isinstance(curvature, Curvature | None):
            raise ValueError(f"`{self._call(curvature=curvature)}`: expected a Curvature, such as EKFAC(damping=0.1).")
        if isinstance(curvature, IterativeCurvature):
            kind = type(curvature).__name__
            raise ValueError(
                f"`{self._call(curvature=curvature)}`: expected a curvature whose factors are added up over the data, "
                f"such as EKFAC(). {kind} goes back to the model and the data instead: after the fit, use "
                f"InfluenceFunction(model, {kind}(...)).fit(train)."
            )
        self.curvature = EKFAC() if curvature is None else curvature
        if dtype not in (None, "bfloat16"):
            raise ValueError(f"`{self._call(dtype=dtype)}`: expected 'bfloat16', or None to keep all digits.")
        self.train, self.dtype = train, dtype
        self._usable: list[int] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget which examples of another fit's data had a target."""
        super().setup(trainer, pl_module, stage)
        self._usable = None

    def check(self, recording: Recording) -> None:
        """Take in one batch, so that whatever cannot work is said now."""
        examples = recording.examples(self._train(recording))
        loss = self.examine(recording, examples)
        curvature = _twin(self.curvature)
        with GradientCapture(recording.model, self.components) as capture:
            curvature.start(capture.components)
            curvature.observe(capture, *next(iter(examples)), loss)

    def record(self, recording: Recording) -> None:
        """Fit on this rank's part of the examples, adding up after each pass; rank 0 writes."""
        train = self._train(recording)
        loss = recording.loss(recording.examples(train), self.settled_loss)
        if self._usable is None:
            self._usable = _supervised(recording.examples(train), loss)
        curvature = _twin(self.curvature)
        with (
            GradientCapture(recording.model, self.components) as capture,
            recording.progress(curvature.num_passes * len(train)) as advance,
        ):
            curvature.start(capture.components)
            curvature.omitted = train.omitted
            own = self._usable[recording.trainer.global_rank :: recording.trainer.world_size]
            examples = recording.examples(train, indices=own or self._usable[:1], advance=advance)
            for _ in range(curvature.num_passes):
                needed = curvature.needed(own)
                part = ExampleLoader(examples, indices=needed or own[:1] or self._usable[:1])
                recording.on_each_rank(lambda: _observe(curvature, capture, part, loss))  # noqa: B023
                if not needed:  # more ranks than examples: this one has to add sums of the same shapes, but nothing
                    _clear(curvature)
                recording.sum_over_ranks(curvature.partial())
                _share_work(recording, curvature)
                curvature.close_pass(capture, part, loss)
        if recording.is_writer:
            self._save(recording, curvature, loss, train)

    def _train(self, recording: Recording) -> ExampleLoader:
        data = training_data(self._call(), recording.trainer) if self.train is None else self.train
        return ExampleLoader(data, self.batch_size)

    def _save(self, recording: Recording, curvature: Curvature, loss: ExampleLoss, train: ExampleLoader) -> None:
        store = Store.create(
            recording.folder,
            recording.model,
            curvature.components,
            reduction=loss.reduction,
            trained_reduction=self.trained_reduction,
            precision=str(recording.trainer.precision),
            step=recording.step,
            train=data_fingerprint(train.dataset),
        )
        assert self._usable is not None
        store.write_curvature("curvature", curvature, dtype=self.dtype, num_examples=len(self._usable))


def _twin(curvature: Curvature) -> Curvature:
    """An unfitted one with the same settings: each recording begins anew."""
    return type(curvature)(**curvature.settings())


def _observe(curvature: Curvature, capture: GradientCapture, examples: ExampleLoader, loss: ExampleLoss) -> None:
    for ids, batch in examples:
        curvature.observe(capture, ids, batch, loss)


def _share_work(recording: Recording, curvature: Curvature) -> None:
    """Eigendecompositions: a part of them on each rank, all of them for each."""
    rank, ranks = recording.trainer.global_rank, recording.trainer.world_size
    if ranks > 1:
        found: dict[str, Tensor] = {}
        recording.on_each_rank(lambda: found.update(curvature.decompose(rank, ranks)))
        recording.sum_over_ranks(found)


def _clear(curvature: Curvature) -> None:
    for total in curvature.partial().values():
        total.zero_()


def _supervised(examples: ExampleLoader, loss: ExampleLoss) -> list[int]:
    """Positions of the examples that have a target; the others, which have no gradient, are reported."""
    usable: list[int] = []
    for ids, batch in examples:
        usable += ids[loss.supervised(batch).cpu() > 0].tolist()
    if not usable:
        raise ValueError("no training example has a supervised target; check the label mask.")
    left: Sequence[int] = sorted(set(examples.ids) - set(usable))
    if left:
        rank_zero_warn(
            f"CurvatureRecorder: {len(left)} of {examples.num_examples} training examples have no supervised target "
            f"and are left out (positions {list(left[:8])})."
        )
    return usable
