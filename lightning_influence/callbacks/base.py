"""The part all recorders share: when to record, where to write, and leaving the training as it was."""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_influence.callbacks import records
from lightning_influence.callbacks.checkpoint_watch import CheckpointWatch, SavedCheckpoint, checkpoint_files
from lightning_influence.callbacks.examination import Examination, examine, resolve
from lightning_influence.callbacks.guard import pristine
from lightning_influence.callbacks.preconditions import check_averaging, check_loss, check_savers, check_strategy
from lightning_influence.callbacks.recording import RankError, Recording, Trigger, raise_together
from lightning_influence.callbacks.records import Record, find_records
from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.capture.losses import Batch, ExampleLoss
from lightning_influence.capture.unfit import UnfitExamplesError
from lightning_influence.store import model_fingerprint

When = Literal["checkpoint", "fit_end", "both"]
Keep = Literal["all", "with_checkpoint"]
Loss = ExampleLoss | Callable[[nn.Module, Batch], Tensor]


class Recorder(Callback, ABC):
    """Records something about the model at checkpoints and at the end of fit, without touching the training.

    Weights, optimizer states, metrics and random states after the fit are bit for bit those of a fit without the
    callback. Recordings go to ``<folder of the checkpoints>/influence/<name>/step=00000012/``, where the number is
    ``trainer.global_step``; the folders on disk are the truth, the checkpoint only remembers where they are. A
    recording of a step that is reached again replaces the older one. Nothing is recorded in ``fast_dev_run``. Limits
    on wall-clock time (``max_time``, savers that save by time) count the time of recordings too.

    A subclass sets ``default_name`` and implements `record`; it may implement `check`.

    Args:
        when: At which weights: ``"checkpoint"``, each time one has really been saved; ``"fit_end"``, those at the
            end of training; ``"both"``.
        dirpath: Parent of the recorder's folder; None takes ``influence`` beside the files of the first
            checkpoint callback, or below the Trainer's ``default_root_dir``.
        components: Which parameters, see `find_components`; None for everything trainable.
        loss: Loss of one example, see `resolve_loss`; None takes the module's ``example_losses``, one that fits
            the batches, or what ``training_step`` returns, where it adds up over examples (`TrainingStepLoss`).
        batch_size: Examples per batch of a recording; None takes that of the loader.
        keep: ``"all"`` recordings, or only those ``"with_checkpoint"``: when `ModelCheckpoint` deletes or
            overwrites a file, its recording goes too.
        name: Name of the recorder's folder and of what it logs; several recorders of a class need different ones.

    Raises:
        ValueError: If an argument is not one of the above.
    """

    default_name: ClassVar[str] = "recorder"

    def __init__(
        self,
        when: When = "both",
        dirpath: str | None = None,
        components: str | list[str] | Callable[[str, nn.Module], bool] | None = None,
        loss: Loss | None = None,
        batch_size: int | None = None,
        keep: Keep = "all",
        name: str | None = None,
    ) -> None:
        self.name = self.default_name if name is None else name
        if when not in get_args(When):
            raise ValueError(f"`{self._call(when=when)}`: expected one of {get_args(When)}.")
        if keep not in get_args(Keep):
            raise ValueError(f"`{self._call(keep=keep)}`: expected one of {get_args(Keep)}.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`{self._call(batch_size=batch_size)}`: expected an int >= 1, or None.")
        if not self.name or Path(self.name).name != self.name or self.name.endswith(".ckpt"):
            raise ValueError(f"`{self._call(name=name)}`: expected the name of a folder, not a path.")
        self.when = when
        self.dirpath = dirpath
        self.components = components
        self.loss = loss
        self.batch_size = batch_size
        self.keep = keep
        self.root: Path | None = None
        self._roots: list[str] = []
        self._watch = CheckpointWatch()
        self._recorded: int | None = None
        self._examination: Examination | None = None
        self._restored = False

    @abstractmethod
    def record(self, recording: Recording) -> None:
        """Compute and, where ``recording.is_writer``, write into ``recording.folder``; called on every rank.

        The model may be run freely (see `pristine`). Collectives only through `Recording.on_each_rank`.
        """

    def check(self, recording: Recording) -> None:
        """Raise now, at the start of training, what would otherwise be raised after the first long pass."""
        return

    def examine(self, recording: Recording, train: ExampleLoader, layout: ExampleLoader | None = None) -> ExampleLoss:
        """Settle the loss of all recordings of this fit: `check` calls it where losses are recorded.

        It is ``loss=``, the module's ``example_losses``, one that fits the batches, or what ``training_step``
        returns (`TrainingStepLoss`). Two training examples are compared alone and in their batch, and the losses
        with what ``training_step`` returns.

        Args:
            recording: The one handed to `check`.
            train: Training examples, from `Recording.examples`.
            layout: Examples whose layout decides; None for the training examples.

        Returns:
            The loss, computed in the precision of the training.

        Raises:
            ValueError: If the loss of an example depends on the rest of its batch.
        """
        loss = resolve(recording, train if layout is None else layout, self.loss)
        self._examination = examine(recording, train, loss, self.components)
        return recording.in_precision(self._examination.loss)

    @property
    def settled_loss(self) -> Loss | None:
        """The loss that `examine` found; ``loss=`` before."""
        return self.loss if self._examination is None else self._examination.loss

    @property
    def trained_reduction(self) -> str:
        """What ``training_step`` makes of the examples' losses, as `examine` found it."""
        return "not compared" if self._examination is None else self._examination.trained_reduction

    @property
    def records(self) -> list[Record]:
        """Finished recordings on disk, by step, with those of the runs that were resumed."""
        found = {record.step: record for root in self._roots for record in find_records(root)}
        return [found[step] for step in sorted(found)]

    # -- state: JSON only, a resume with weights_only=True refuses everything else

    @property
    def state_key(self) -> str:
        """Unique for every folder that is written to."""
        return self._generate_state_key(name=self.name, dirpath=self.dirpath)

    def state_dict(self) -> dict[str, Any]:
        """Where the recordings are; what they are is read from disk."""
        return {"version": 1, "roots": list(self._roots)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run, possibly with recordings in another folder."""
        self._roots = list(state_dict["roots"])
        self._restored = True

    # -- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything runs."""
        if stage != "fit":
            return
        self._examination = None
        check_strategy(self._call(), trainer)
        check_loss(self._call(loss=self.loss), pl_module, self.loss)
        if self.when == "checkpoint":
            check_savers(self._call(when=self.when), trainer)
        if self.when != "fit_end":
            check_averaging(self._call(when=self.when), trainer)
        others: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        recorders = [c for c in others if isinstance(c, Recorder) and c is not self]
        if any((other.name, other.dirpath) == (self.name, self.dirpath) for other in recorders):
            raise MisconfigurationException(
                f"`{self._call(name=self.name)}`: another recorder writes into the same folder. "
                "Expected a `name=` of its own for each."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder and start to watch for checkpoints."""
        self._recorded = None
        self._watch.start(trainer)
        self.root = records.resolve_root(trainer, self.dirpath, self.name)
        self._remember_root()
        if not self._watch.active:
            rank_zero_info(f"{type(self).__name__}: nothing is recorded in a fast_dev_run.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the first examples; record the checkpoint resumed from if the run was killed before it could."""
        self._watch.refresh(trainer)  # some strategies restore callbacks after on_fit_start
        if not self._watch.active:
            return
        recording = self._recording(trainer, pl_module, SavedCheckpoint(trainer.global_step, None), "checkpoint")
        error = self._attempt(recording, self.check)
        if error is not None:
            cause = error.__cause__ or error
            if isinstance(cause, UnfitExamplesError):
                raise UnfitExamplesError(f"{self._call(name=self.name)}: {cause}", cause.ids) from cause
            raise cause
        if trainer.is_global_zero:
            records.sweep(recording.folder.parent)
            self._warn_of_other_runs(trainer)
        trainer.strategy.barrier()
        self._catch_up(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that a checkpoint is being saved; the work is done at the next safe hook."""
        self._watch.note(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record if a checkpoint has been saved."""
        self._flush(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record if a checkpoint has been saved."""
        self._flush(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record if a checkpoint has been saved."""
        self._flush(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the last checkpoint, or the weights at the end."""
        if self._watch.active:
            self._flush(trainer, pl_module, ending=True)
            if self.when != "checkpoint" and self._recorded != trainer.global_step:
                self._record(trainer, pl_module, SavedCheckpoint(trainer.global_step, None), "fit_end")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Point out a checkpoint that the module saved in its own ``on_train_end``, after all callbacks."""
        missed = None if self.when == "fit_end" else self._watch.take(trainer)
        if missed is not None and missed.step != self._recorded:
            rank_zero_warn(
                f"`{self._call(when=self.when)}`: a checkpoint was saved at step {missed.step} after the recorder's "
                "last hook and is not recorded. Expected when='both', or a save in a callback."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A checkpoint saved because of an exception is not recorded."""
        self._watch.stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching."""
        self._watch.stop()
        self._restored = False

    # -- work

    def _flush(self, trainer: Trainer, pl_module: LightningModule, *, ending: bool = False) -> None:
        saved = None if self.when == "fit_end" else self._watch.take(trainer, ending=ending)
        if saved is not None and saved.step != self._recorded:
            self._record(trainer, pl_module, saved, "checkpoint")

    def _catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run killed between saving a checkpoint and recording it is resumed from there."""
        resumed = self._restored and trainer.ckpt_path is not None and trainer.global_step > 0
        if resumed and self.when != "fit_end" and trainer.global_step not in {r.step for r in self.records}:
            saved = SavedCheckpoint(trainer.global_step, str(trainer.ckpt_path))
            self._record(trainer, pl_module, saved, "checkpoint")

    def _record(self, trainer: Trainer, pl_module: LightningModule, saved: SavedCheckpoint, trigger: Trigger) -> None:
        recording = self._recording(trainer, pl_module, saved, trigger)
        started = time.perf_counter()
        error = self._attempt(recording, lambda recording: self._write(recording, started))
        if error is not None:
            shutil.rmtree(recording.folder, ignore_errors=True)
            raise RuntimeError(
                f"{self._call(name=self.name)} failed at step {saved.step} ({trigger}): {error}\n"
                "The training is unharmed: repair the cause, or leave the callback out, and continue with "
                f"`trainer.fit(..., ckpt_path={saved.path or '...'!r})`."
            ) from (error.__cause__ or error)
        self._recorded = saved.step
        seconds = time.perf_counter() - started
        for logger in trainer.loggers:
            logger.log_metrics({f"influence/{self.name}/seconds": seconds}, step=trainer.global_step)

    def _recording(
        self, trainer: Trainer, pl_module: LightningModule, saved: SavedCheckpoint, trigger: Trigger
    ) -> Recording:
        assert self.root is not None
        folder = records.unfinished(self.root, saved.step)
        return Recording(trainer, pl_module, saved.step, trigger, saved.path, folder, self.name)

    def _attempt(self, recording: Recording, work: Callable[[Recording], None]) -> RankError | None:
        """Run something with the model protected; an error on any rank is an error on all."""
        error = None
        try:
            with pristine(recording.trainer, recording.model):
                work(recording)
        except Exception as problem:
            error = problem
        try:
            raise_together(recording.trainer, error)
        except RankError as problem:
            return problem
        return None

    def _write(self, recording: Recording, started: float) -> None:
        trainer, step = recording.trainer, recording.step
        if recording.is_writer:
            records.begin(recording.folder)
        self.record(recording)
        if recording.is_writer:
            assert self.root is not None
            path = records.folder(self.root, step)
            seconds = round(time.perf_counter() - started, 3)
            digest = model_fingerprint(recording.model)
            record = Record(path, step, recording.trigger, recording.checkpoint, digest, seconds)
            records.finish(recording.folder, record)
            if self.keep == "with_checkpoint":
                records.prune(self.root, checkpoint_files(trainer))

    def _remember_root(self) -> None:
        root = str(self.root)
        earlier = self._roots if self._restored else []
        self._roots = [*(r for r in earlier if r != root), root]

    def _warn_of_other_runs(self, trainer: Trainer) -> None:
        ahead = [record.step for record in self.records if record.step > trainer.global_step]
        if ahead:
            rank_zero_warn(
                f"{type(self).__name__}: {self.root} holds recordings of another run at steps {ahead[:8]}, ahead of "
                f"step {trainer.global_step}. Those of a step that is recorded again are replaced, the others stay "
                "and will be listed with the new ones; expected an empty folder (`dirpath=` or `name=`)."
            )

    def _call(self, **arguments: Any) -> str:
        inside = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        return f"{type(self).__name__}({inside})"
