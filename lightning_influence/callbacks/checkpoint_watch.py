"""When was a checkpoint really saved? Lightning has no hook that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import Trainer


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint whose weights are the live ones at this moment.

    Attributes:
        step: ``trainer.global_step``, the number of optimizer steps taken.
        path: The file, where it is known. It may be deleted, or with asynchronous savers not yet be written.
    """

    step: int
    path: str | None


class CheckpointWatch:
    """Detects saved checkpoints; the owner asks at hooks where the weights are still those that were saved.

    ``Callback.on_save_checkpoint`` fires before the file exists, twice with ``save_last=True``, from the learning
    rate finder, during exceptions, and not at all with ``save_weights_only=True``. So it only leaves a note, and
    `take` also compares what the checkpoint callbacks say about their last save. The savers run after every other
    callback: `take` is meant for ``on_train_batch_start``, ``on_validation_start``, ``on_train_epoch_start`` and
    ``on_train_end``. Every rank comes to the same answer without talking to the others.
    """

    def __init__(self) -> None:
        self.active = False
        self._noted: int | None = None
        self._seen: dict[int, tuple[Any, ...]] = {}
        self._known: set[str] = set()

    def start(self, trainer: Trainer) -> None:
        """Forget everything so far: for ``on_fit_start``, after the tuners and before any real save."""
        self.active = not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._noted = None
        self.refresh(trainer)

    def refresh(self, trainer: Trainer) -> None:
        """Take the present state of the checkpoint callbacks as seen: some strategies restore it late."""
        self._seen = {id(saver): _last_save(saver) for saver in trainer.checkpoint_callbacks}
        self._known = {path for saver in trainer.checkpoint_callbacks for path in _ranked_paths(saver)}

    def stop(self) -> None:
        """No save from now on counts: for ``on_exception`` and ``teardown``."""
        self.active = False
        self._noted = None

    def note(self, trainer: Trainer) -> None:
        """``on_save_checkpoint`` has fired."""
        if self.active and not trainer.sanity_checking:
            self._noted = trainer.global_step

    def take(self, trainer: Trainer, *, ending: bool = False) -> SavedCheckpoint | None:
        """The checkpoint saved since the last call, if its weights are still the live ones.

        Args:
            trainer: The running Trainer.
            ending: At ``on_train_end`` a ``ModelCheckpoint`` that has saved nothing so far writes its
                ``last.ckpt`` right after the other callbacks, from the same weights: it counts as saved.
        """
        if not self.active or trainer.sanity_checking:
            return None
        changed = [s for s in trainer.checkpoint_callbacks if _last_save(s) != self._seen.get(id(s))]
        late = [s for s in trainer.checkpoint_callbacks if ending and _saves_at_the_end(s)]
        noted, self._noted = self._noted, None
        if not changed and not late and noted is None:
            return None
        path = next((p for p in map(self._path, changed) if p), None)
        self.refresh(trainer)
        steps = {step for step in (noted, *map(_step, changed)) if step is not None}
        if not late and steps and trainer.global_step not in steps:
            rank_zero_warn(
                f"a checkpoint was saved at step {max(steps)}, but the weights have moved on to step "
                f"{trainer.global_step} since: it is not recorded. Expected it to be saved after the optimizer's step, "
                "for example in `on_train_batch_end`."
            )
            return None
        return SavedCheckpoint(trainer.global_step, path)

    def _path(self, saver: Any) -> str | None:
        """A file of its own if there is one; ``last.ckpt`` will soon hold other weights."""
        new = [path for path in _ranked_paths(saver) if path not in self._known]
        path = new[-1] if new else getattr(saver, "_last_checkpoint_saved", None)
        return str(path) if path else None


def checkpoint_files(trainer: Trainer) -> set[str]:
    """Every file that a checkpoint callback still counts as its own, written or about to be."""
    attributes = ("best_model_path", "last_model_path", "_last_checkpoint_saved")
    files = [str(getattr(saver, name, "")) for saver in trainer.checkpoint_callbacks for name in attributes]
    ranked = [path for saver in trainer.checkpoint_callbacks for path in _ranked_paths(saver)]
    return {path for path in (*files, *ranked) if path}


def _last_save(saver: Any) -> tuple[Any, ...]:
    """What changes with every save: ModelCheckpoint's own record of it, or the public paths of another class."""
    if hasattr(saver, "_last_global_step_saved"):
        return saver._last_global_step_saved, getattr(saver, "_last_checkpoint_saved", None)
    return getattr(saver, "best_model_path", None), getattr(saver, "last_model_path", None)


def _step(saver: Any) -> int | None:
    return getattr(saver, "_last_global_step_saved", None)


def _ranked_paths(saver: Any) -> list[str]:
    """Files kept for their rank, the newest last."""
    paths = [getattr(saver, "best_model_path", ""), *getattr(saver, "best_k_models", {})]
    return [str(path) for path in paths if path]


def _saves_at_the_end(saver: Any) -> bool:
    return bool(getattr(saver, "save_last", None)) and not getattr(saver, "_last_checkpoint_saved", "")
