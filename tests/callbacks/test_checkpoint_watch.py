"""Every way of saving a checkpoint, against what ``trainer.save_checkpoint`` really wrote."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    Checkpoint,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader

from lightning_influence.callbacks.checkpoint_watch import CheckpointWatch, checkpoint_files
from tests.callbacks.toys import Manual, Toy, data, loader, trainer


class Watching(Callback):
    """Asks at the hooks where a recorder asks."""

    def __init__(self) -> None:
        self.watch = CheckpointWatch()
        self.steps: list[int] = []
        self.paths: list[str | None] = []
        self.same: list[bool] = []

    def ask(self, trainer, module, ending=False):
        saved = self.watch.take(trainer, ending=ending)
        if saved is None or saved.step in self.steps:
            return
        assert saved.step == trainer.global_step
        assert saved.path is None or saved.path in checkpoint_files(trainer)
        self.steps.append(saved.step)
        self.paths.append(saved.path)
        if saved.path and Path(saved.path).exists():
            state = torch.load(saved.path, weights_only=True)["state_dict"]
            self.same.append(all(torch.equal(p, state[n]) for n, p in module.named_parameters()))

    def on_fit_start(self, trainer, module):
        self.watch.start(trainer)

    def on_train_start(self, trainer, module):
        self.watch.refresh(trainer)

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.watch.note(trainer)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.ask(trainer, module)

    def on_train_epoch_start(self, trainer, module):
        self.ask(trainer, module)

    def on_validation_start(self, trainer, module):
        self.ask(trainer, module)

    def on_train_end(self, trainer, module):
        self.ask(trainer, module, ending=True)

    def on_exception(self, trainer, module, exception):
        self.watch.stop()


class OwnSaver(Checkpoint):
    """A saver that keeps no account of what it saved."""

    def __init__(self, folder: Path, weights_only: bool = False) -> None:
        self.folder = folder
        self.weights_only = weights_only
        self.best_model_path = ""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step % 3 == 0:
            path = str(self.folder / f"own{trainer.global_step}.ckpt")
            trainer.save_checkpoint(path, self.weights_only)
            self.best_model_path = path


class SlowIO(AsyncCheckpointIO):
    """Writes after the training has ended."""


class Breaking(Toy):
    def training_step(self, batch, batch_idx):
        if self.global_step == 5:
            raise RuntimeError("boom")
        return super().training_step(batch, batch_idx)


class SavingInStep(Toy):
    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "early.ckpt")
        return super().training_step(batch, batch_idx)


class SavingByHook(Toy):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == 3:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "by_hand.ckpt")


def savers(**kwargs: Any):
    return lambda folder: [ModelCheckpoint(dirpath=str(folder / "ck"), **kwargs)]


@dataclass
class Case:
    name: str
    callbacks: Any
    steps: list[int]
    settings: dict[str, Any] = field(default_factory=dict)
    extra: Any = list
    model: type = Toy
    validation: bool = True
    same: bool = True  # whether the file holds the live weights


ALL = {"save_top_k": -1}
CASES = [
    Case("default", savers(), [4, 8]),
    Case("no ModelCheckpoint given", lambda folder: [], [4, 8]),
    Case("every step, top-k and last", savers(every_n_train_steps=1, save_last=True, **ALL), [1, 2, 3, 4, 5, 6, 7, 8]),
    Case("without validation", savers(every_n_train_steps=3, **ALL), [3, 6], validation=False),
    Case("weights only", savers(save_weights_only=True, **ALL), [4, 8]),
    Case("weights only, monitored", savers(monitor="val_loss", mode="max", save_weights_only=True, **ALL), [4, 8]),
    Case("weights only, last only", savers(save_top_k=0, save_last=True, save_weights_only=True), [8]),
    Case("last only", savers(save_top_k=0, save_last=True), [8]),
    Case("last is a link", savers(save_last="link"), [4, 8]),
    Case("monitored, best kept, last kept", savers(monitor="val_loss", save_last=True, **ALL), [4, 8]),
    Case("monitored, only the first improves", savers(monitor="epoch", save_last="link"), [4]),
    Case(
        "a link that is renamed without a save",
        lambda folder: [renamed_link(ModelCheckpoint(dirpath=str(folder / "ck"), monitor="epoch", save_last="link"))],
        [4],
    ),
    Case(
        "two savers",
        lambda folder: [*savers(every_n_train_steps=3, **ALL)(folder), *savers(filename="b{step}")(folder)],
        [3, 4, 6, 8],
    ),
    Case("by time", savers(train_time_interval=datetime.timedelta(0), **ALL), [1, 2, 3, 4, 5, 6, 7, 8]),
    Case("validation twice an epoch", savers(monitor="val_loss", **ALL), [2, 4, 6, 8], {"val_check_interval": 0.5}),
    Case("after validation", savers(save_on_train_epoch_end=False, **ALL), [4, 8]),
    Case(
        "deferred until validation",
        savers(monitor="val_loss", every_n_train_steps=2, save_on_train_epoch_end=False, **ALL),
        [4, 6, 8],
    ),
    Case("accumulation", savers(every_n_train_steps=1, **ALL), [1, 2, 3, 4], {"accumulate_grad_batches": 3}),
    Case("file overwritten in place", savers(filename="fixed", enable_version_counter=False), [4, 8]),
    Case("stopped in the middle", savers(every_n_train_steps=2, **ALL), [2, 4, 6], {"max_steps": 6, "max_epochs": -1}),
    Case("own saver", lambda folder: [OwnSaver(folder)], [3, 6]),
    Case("own saver, weights only", lambda folder: [OwnSaver(folder, weights_only=True)], [3, 6]),
    Case("saved by the module", lambda folder: [], [3], {"enable_checkpointing": False}, model=SavingByHook),
    Case("no checkpoints", lambda folder: [], [], {"enable_checkpointing": False}),
    Case("fast_dev_run", savers(), [], {"fast_dev_run": 2}),
    Case("averaged weights", savers(), [4, 8], extra=lambda: [EMAWeightAveraging(decay=0.5)], same=False),
    Case("swapped at the end", savers(), [4, 8, 9], extra=lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=1)]),
    Case("learning rate finder", savers(), [4, 8], extra=lambda: [LearningRateFinder(num_training_steps=3)]),
    Case(
        "manual optimisation",
        savers(every_n_train_steps=2, **ALL),
        [2, 4, 6, 8],
        model=Manual,
    ),
]


def renamed_link(saver: ModelCheckpoint) -> ModelCheckpoint:
    saver.CHECKPOINT_NAME_LAST = "{epoch}-last"
    return saver


def run(case: Case, folder: Path) -> tuple[Watching, list[tuple[int, str]], Any]:
    watching = Watching()
    running = trainer(folder, [watching, *case.extra(), *case.callbacks(folder)], **case.settings)
    written: list[tuple[int, str]] = []
    save = running.save_checkpoint

    def noting(path, *args, **kwargs):
        written.append((running.global_step, str(path)))
        save(path, *args, **kwargs)

    running.save_checkpoint = noting
    running.fit(case.model(), loader(), loader(8, 2) if case.validation else None)
    return watching, written, running


@pytest.mark.filterwarnings(
    "ignore:Using ModelCheckpoint with manual optimization",
    "ignore:Swapping scheduler",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_save_is_seen_once(case, tmp_path):
    watching, written, _ = run(case, tmp_path)
    real = [(step, path) for step, path in written if "lr_find" not in path]
    assert sorted({step for step, _ in real}) == case.steps  # the case is what its name says
    assert watching.steps == case.steps
    assert all(same == case.same for same in watching.same)
    assert {path for path in watching.paths if path} <= {path for _, path in real}


class Sized(Toy):
    """Has a batch size that can be searched for."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self):
        return DataLoader(data(16), batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(8, 2)


def test_the_search_for_a_batch_size_does_not_count(tmp_path):
    watching = Watching()
    finder = BatchSizeFinder(steps_per_trial=1, init_val=2, max_trials=2)
    running = trainer(tmp_path, [watching, finder, *savers()(tmp_path)])
    written, save = [], running.save_checkpoint
    running.save_checkpoint = lambda path, *args, **kwargs: (written.append(str(path)), save(path, *args, **kwargs))
    model = Sized()
    running.fit(model)
    assert model.batch_size == 4
    assert any("scale_batch_size" in path for path in written)
    assert watching.steps == [4, 8]


def test_path_is_the_file_of_the_step_and_not_last(tmp_path):
    case = Case("", savers(every_n_train_steps=2, save_last=True, filename="{step}", **ALL), [])
    watching, _, _ = run(case, tmp_path)
    assert [Path(path).name for path in watching.paths] == [f"step={step}.ckpt" for step in (2, 4, 6, 8)]


def test_path_among_several_kept_files(tmp_path):
    case = Case("", savers(monitor="val_loss", save_last=True, filename="{step}", **ALL), [])
    watching, _, _ = run(case, tmp_path)
    assert [Path(path).name for path in watching.paths] == ["step=4.ckpt", "step=8.ckpt"]


def test_file_may_be_written_later(tmp_path):
    case = Case("", savers(), [4, 8], {"plugins": [AsyncCheckpointIO()]})
    watching, _, _ = run(case, tmp_path)
    assert watching.steps == [4, 8]


def test_last_file_of_a_fast_dev_run_does_not_count(tmp_path):
    case = Case("", savers(save_last=True), [], {"fast_dev_run": 2})
    watching, written, _ = run(case, tmp_path)
    assert [step for step, _ in written] == [2]  # ModelCheckpoint.on_train_end does not look at fast_dev_run
    assert watching.steps == []


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=")
@pytest.mark.parametrize(
    ("saver", "steps"),
    [(lambda f: ModelCheckpoint(dirpath=str(f), save_on_exception=True), [4]), (OnExceptionCheckpoint, [])],
)
def test_save_because_of_an_exception_does_not_count(saver, steps, tmp_path):
    watching = Watching()
    case = Case("", lambda folder: [saver(folder)], steps, model=Breaking, extra=lambda: [watching])
    with pytest.raises(RuntimeError, match="boom"):
        run(case, tmp_path)
    assert watching.steps == steps
    assert not watching.watch.active


def test_weights_that_have_moved_on_are_refused_aloud(tmp_path):
    case = Case("", lambda folder: [], [], {"enable_checkpointing": False}, model=SavingInStep)
    with pytest.warns(UserWarning, match="saved at step 2, but the weights have moved on to step 3"):
        watching, written, _ = run(case, tmp_path)
    assert [step for step, _ in written] == [2]
    assert watching.steps == []


def test_resuming_is_not_saving(tmp_path):
    first = trainer(tmp_path, savers()(tmp_path), max_epochs=1)
    first.fit(Toy(), loader(), loader(8, 2))
    watching = Watching()
    second = trainer(tmp_path, [watching, ModelCheckpoint(dirpath=str(tmp_path / "second"))], max_epochs=2)
    with pytest.warns(UserWarning, match="dirpath has changed"):
        second.fit(Toy(), loader(), loader(8, 2), ckpt_path=first.checkpoint_callback.best_model_path)
    assert watching.steps == [8]
