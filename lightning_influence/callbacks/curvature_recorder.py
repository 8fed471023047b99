"""The curvature of the loss on the training data, fitted while the model is at hand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_influence.callbacks.base import Recorder, When
from lightning_influence.callbacks.examination import resolve
from lightning_influence.callbacks.preconditions import training_data
from lightning_influence.callbacks.recording import Recording
from lightning_influence.capture import ExampleLoader, ExampleLoss, GradientCapture
from lightning_influence.capture.budget import check_bytes
from lightning_influence.capture.contexts import evaluating
from lightning_influence.capture.data_fingerprint import data_fingerprint
from lightning_influence.capture.examples import TRAIN
from lightning_influence.capture.finite import NanPolicy, check_nan_policy
from lightning_influence.capture.unfit import run_batch
from lightning_influence.curvature import EKFAC, Curvature
from lightning_influence.curvature.iterative import IterativeCurvature
from lightning_influence.curvature.kept import KeptRecords
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
        dtype: ``"bfloat16"`` stores factors in half the room, as in `Store.write_curvature`.
        nan_policy: What to do about examples whose loss is not finite with the weights of a recording: ``"raise"`` an
            error that names them, or ``"omit"`` them with a warning; the store tells which.
        memory_budget: As in `Curvature.fit`, on each rank: what is kept of the first pass for the second.
        disk_budget: The same in temporary files.
        scratch: Folder for these files; None takes the system's.
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
        nan_policy: NanPolicy = "raise",
        memory_budget: int = 0,
        disk_budget: int = 0,
        scratch: str | os.PathLike[str] | None = None,
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
        check_nan_policy(type(self).__name__, nan_policy)
        check_bytes(type(self).__name__, "memory_budget", memory_budget)
        check_bytes(type(self).__name__, "disk_budget", disk_budget)
        self.train, self.dtype, self.nan_policy = train, dtype, nan_policy
        self.memory_budget, self.disk_budget, self.scratch = memory_budget, disk_budget, scratch
        self._usable: list[int] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget which examples of another fit's data had a target."""
        super().setup(trainer, pl_module, stage)
        self._usable = None

    def check(self, recording: Recording) -> None:
        """Take in one batch, so that whatever cannot work is said now."""
        train = self._train(recording)
        examples = recording.examples(train)
        if self.nan_policy == "omit":
            loss = recording.in_precision(resolve(recording, examples, self.loss))
            first = train.ids[: train.batch_size]
            odd = _nonfinite(recording, recording.examples(train, indices=first), loss)
            examples = recording.examples(train, indices=sorted(set(first) - set(odd)) or None)
        loss = self.examine(recording, examples)
        curvature = _twin(self.curvature)
        with self._kept(), GradientCapture(recording.model, self.components) as capture:
            curvature.start(capture.components)
            curvature.observe(capture, *next(iter(examples)), loss)

    def record(self, recording: Recording) -> None:
        """Fit on this rank's part of the examples, adding up after each pass; rank 0 writes."""
        train = self._train(recording)
        loss = recording.loss(recording.examples(train), self.settled_loss)
        if self._usable is None:
            self._usable = _supervised(recording.examples(train), loss)
        usable = self._usable if self.nan_policy == "raise" else _finite(recording, train, self._usable, loss)
        curvature = _twin(self.curvature)
        with (
            self._kept() as kept,
            GradientCapture(recording.model, self.components) as capture,
            recording.progress(curvature.num_passes * len(train)) as advance,
        ):
            curvature.start(capture.components)
            curvature.omitted = (*train.omitted, *sorted(set(self._usable) - set(usable)))
            own = usable[recording.trainer.global_rank :: recording.trainer.world_size]
            examples = recording.examples(train, indices=own or usable[:1], advance=advance)
            for done in range(curvature.num_passes):
                needed = curvature.needed(own)
                rest = [k for k in needed if k not in kept.ids] if needed else own[:1] or usable[:1]
                keep = kept if needed and done + 1 < curvature.num_passes else None
                part: Iterable[tuple[Tensor, Any]] = ExampleLoader(examples, indices=rest) if rest else []
                recording.on_each_rank(lambda: _observe(curvature, capture, part, loss, kept, keep))  # noqa: B023
                if not needed:  # more ranks than examples: this one has to add sums of the same shapes, but nothing
                    _clear(curvature)
                recording.sum_over_ranks(curvature.partial())
                _share_work(recording, curvature)
                curvature.close_pass(capture, examples, loss)
        if recording.is_writer:
            self._save(recording, curvature, loss, train, len(usable))

    def _kept(self) -> KeptRecords:
        return KeptRecords(self.memory_budget, self.disk_budget, self.scratch)

    def _train(self, recording: Recording) -> ExampleLoader:
        data = training_data(self._call(), recording.trainer) if self.train is None else self.train
        return ExampleLoader(data, self.batch_size, what=TRAIN)

    def _save(
        self, recording: Recording, curvature: Curvature, loss: ExampleLoss, train: ExampleLoader, count: int
    ) -> None:
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
        store.write_curvature("curvature", curvature, dtype=self.dtype, num_examples=count)


def _twin(curvature: Curvature) -> Curvature:
    """An unfitted one with the same settings: each recording begins anew."""
    return type(curvature)(**curvature.settings())


def _observe(
    curvature: Curvature,
    capture: GradientCapture,
    examples: Iterable[tuple[Tensor, Any]],
    loss: ExampleLoss,
    kept: KeptRecords,
    keep: KeptRecords | None,
) -> None:
    curvature.see_again(kept)
    for ids, batch in examples:
        curvature.observe(capture, ids, batch, loss, keep=keep)


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


def _finite(recording: Recording, train: ExampleLoader, usable: list[int], loss: ExampleLoss) -> list[int]:
    """Positions of the examples whose loss is finite, from a look at this rank's part of them on each rank."""
    own = usable[recording.trainer.global_rank :: recording.trainer.world_size]
    found = recording.on_each_rank(
        lambda: _nonfinite(recording, recording.examples(train, indices=own), loss) if own else []
    )
    odd = sorted(k for part in found for k in part)
    if len(odd) == len(usable):
        raise ValueError(f"the loss of none of {len(usable)} training examples is finite; repair the model.")
    if odd:
        rank_zero_warn(
            f"CurvatureRecorder, step {recording.step}: {len(odd)} of {len(usable)} training examples are left out "
            f"because their loss is not finite (positions {odd[:8]})."
        )
    return sorted(set(usable) - set(odd))


def _nonfinite(recording: Recording, examples: ExampleLoader, loss: ExampleLoss) -> list[int]:
    odd: list[int] = []
    with evaluating(recording.model), torch.no_grad():
        for ids, batch in examples:
            losses = run_batch(partial(loss.losses, recording.model), batch, ids, examples.what)
            odd += ids[~losses.isfinite().cpu()].tolist()
    return odd


def _supervised(examples: ExampleLoader, loss: ExampleLoss) -> list[int]:
    """Positions of the examples that have a target; the others, which have no gradient, are reported."""
    usable: list[int] = []
    for ids, batch in examples:
        usable += ids[run_batch(loss.supervised, batch, ids, examples.what).cpu() > 0].tolist()
    if not usable:
        raise ValueError("no training example has a supervised target; check the label mask.")
    left: Sequence[int] = sorted(set(examples.ids) - set(usable))
    if left:
        rank_zero_warn(
            f"CurvatureRecorder: {len(left)} of {examples.num_examples} training examples have no supervised target "
            f"and are left out (positions {list(left[:8])})."
        )
    return usable
