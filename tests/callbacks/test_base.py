"""Recorders leave the training bit for bit as it was, and what they write can be found again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F

from lightning_influence.callbacks.recording import Recording
from lightning_influence.callbacks.records import find_records
from lightning_influence.store import model_fingerprint
from tests.callbacks import toys
from tests.callbacks.toys import (
    Failing,
    Interrupted,
    Manual,
    NormRecorder,
    Toy,
    assert_norms,
    assert_same,
    every_step,
    fit,
    loader,
    run,
    steps,
    trainer,
)

# -- the training does not notice


@pytest.mark.parametrize("validation", [1.0, 0.5])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_bit_identical(accumulate, validation, tmp_path):
    settings = {"accumulate_grad_batches": accumulate, "val_check_interval": validation}
    plain = fit([every_step(tmp_path / "a", 2)], tmp_path, **settings)
    recorder = NormRecorder(batch_size=5)
    recorded = fit([recorder, every_step(tmp_path / "b", 2)], tmp_path, **settings)
    assert len(recorder.records) >= 2
    assert_same(recorded, plain)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_training_is_bit_identical_in_other_precisions(precision, tmp_path):
    plain = fit([every_step(tmp_path / "a", 3)], tmp_path, precision=precision)
    recorder = NormRecorder(when="checkpoint")
    assert_same(fit([recorder, every_step(tmp_path / "b", 3)], tmp_path, precision=precision), plain)
    assert steps(recorder) == [3, 6]


def test_training_is_bit_identical_in_a_compiled_model(tmp_path):
    def compiled() -> Toy:
        model = Toy()
        model.net = torch.compile(model.net, backend="eager")
        return model

    seed_everything(1, verbose=False)
    plain = fit([], tmp_path / "a", compiled(), max_epochs=1)
    seed_everything(1, verbose=False)
    recorder = NormRecorder()
    assert_same(fit([recorder], tmp_path / "b", compiled(), max_epochs=1), plain)
    assert all(norm > 0 for norm in toys.read_norms(recorder.records[0].path).values())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_the_loops_own_loader_is_never_iterated(tmp_path):
    """Iterating a loader with persistent workers resets the running epoch: 4 batches instead of 12."""
    recorder = NormRecorder(when="checkpoint", batch_size=3)
    seen = []
    for callbacks in ([], [recorder]):
        seed_everything(1, verbose=False)
        model = Toy()
        running = trainer(tmp_path / str(len(callbacks)), [*callbacks, every_step(tmp_path / str(len(callbacks)))])
        running.fit(model, loader(shuffle=True, num_workers=1, persistent_workers=True))
        seen.append(torch.cat(model.seen))
    assert torch.equal(*seen)
    assert steps(recorder) == list(range(1, 9))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_all_examples_are_recorded_whatever_the_loop_visits(tmp_path):
    recorder = NormRecorder(when="fit_end")
    trainer(tmp_path, [recorder], limit_train_batches=1, max_epochs=1).fit(Toy(), loader(16, drop_last=True))
    [record] = recorder.records
    assert sorted(toys.read_norms(record.path)) == list(range(16))


def test_gradients_are_those_of_the_saved_weights(tmp_path):
    """Against an autograd loop on the model as loaded from the file."""
    recorder = NormRecorder(when="checkpoint")
    run(tmp_path, [recorder, every_step(tmp_path, 3)])
    for record in recorder.records:
        model = Toy.load_from_checkpoint(record.checkpoint).eval()
        assert_norms(model, toys.read_norms(record.path), toys.data())


# -- when


@pytest.mark.parametrize(("when", "expected"), [("checkpoint", [3, 6]), ("fit_end", [8]), ("both", [3, 6, 8])])
def test_when(when, expected, tmp_path):
    recorder = NormRecorder(when=when)
    run(tmp_path, [recorder, every_step(tmp_path, 3)])
    assert steps(recorder) == expected
    triggers = {3: "checkpoint", 6: "checkpoint", 8: "fit_end"}
    assert [r.trigger for r in recorder.records] == [triggers[step] for step in expected]


def test_a_step_is_recorded_once(tmp_path):
    calls = []

    class Counting(NormRecorder):
        def record(self, recording):
            calls.append(recording.step)
            super().record(recording)

    savers = [every_step(tmp_path, 4, save_last=True), ModelCheckpoint(dirpath=str(tmp_path), filename="second")]
    run(tmp_path, [Counting(), *savers])
    assert calls == [4, 8]


class SavingLast(Toy):
    def on_train_end(self):
        self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "by_hand.ckpt")


def test_a_save_after_all_callbacks_is_pointed_out(tmp_path):
    with pytest.warns(UserWarning, match="saved at step 4 after the recorder's last hook and is not recorded"):
        run(tmp_path, [NormRecorder(when="checkpoint"), every_step(tmp_path, 3)], SavingLast, max_epochs=1)
    run(tmp_path / "both", [NormRecorder(), every_step(tmp_path / "both", 3)], SavingLast, max_epochs=1)


def test_nothing_is_recorded_in_a_fast_dev_run(tmp_path):
    recorder = NormRecorder()
    run(tmp_path, [recorder, every_step(tmp_path)], fast_dev_run=2)
    assert recorder.records == []
    assert not list(tmp_path.rglob("step=*"))


def test_sanity_check_and_learning_rate_finder_are_not_recorded(tmp_path):
    recorder = NormRecorder(when="checkpoint")
    finder = LearningRateFinder(num_training_steps=3)
    run(tmp_path, [recorder, finder, every_step(tmp_path, 4)], num_sanity_val_steps=2)
    assert steps(recorder) == [4, 8]


def test_validation_outside_of_a_fit_records_nothing(tmp_path):
    recorder = NormRecorder()
    running = trainer(tmp_path, [recorder])
    running.validate(Toy(), loader(8), verbose=False)
    assert recorder.records == []


def test_weights_only_checkpoints_are_recorded(tmp_path):
    recorder = NormRecorder(when="checkpoint")
    run(tmp_path, [recorder, every_step(tmp_path, 4, save_weights_only=True)])
    assert steps(recorder) == [4, 8]
    assert [Path(r.checkpoint).name for r in recorder.records] == ["step=4.ckpt", "step=8.ckpt"]


def test_an_exception_during_fit_is_not_recorded_and_leaves_no_half_folder(tmp_path):
    recorder = NormRecorder(when="checkpoint")
    savers = [every_step(tmp_path, 3, save_on_exception=True)]
    with pytest.raises(SystemExit):
        run(tmp_path, [recorder, *savers, Interrupted(5)])
    assert (tmp_path / "step=5.ckpt").exists()
    assert steps(recorder) == [3]
    assert not list(tmp_path.rglob("*.tmp"))


# -- where


def test_folder_is_beside_the_checkpoints(tmp_path):
    recorder = NormRecorder(when="fit_end")
    run(tmp_path, [recorder, every_step(tmp_path / "models", 8)])
    [record] = recorder.records
    assert record.path == tmp_path / "models" / "influence" / "norms" / "step=00000008"
    assert sorted(p.name for p in record.path.iterdir()) == ["norms.json", "record.json"]
    assert find_records(record.path.parent) == [record]


def test_folder_without_checkpoints_or_where_the_user_says(tmp_path):
    here = NormRecorder(when="fit_end")
    there = NormRecorder(when="fit_end", dirpath=str(tmp_path / "there"), name="mine")
    run(tmp_path, [here, there], enable_checkpointing=False)
    assert here.records[0].path.parent == tmp_path / "influence" / "norms"
    assert there.records[0].path.parent == tmp_path / "there" / "mine"


def test_remote_checkpoints_need_a_local_folder(tmp_path):
    saver = ModelCheckpoint(dirpath="memory://ck")
    with pytest.raises(MisconfigurationException, match=r"local folder\. Pass `dirpath=`"):
        run(tmp_path, [NormRecorder(), saver], max_epochs=1)


def test_recordings_go_with_their_checkpoints(tmp_path):
    kept = NormRecorder(keep="with_checkpoint", name="kept", when="checkpoint")
    every = NormRecorder(when="checkpoint")
    run(tmp_path, [kept, every, every_step(tmp_path, 2, save_top_k=1)])
    assert steps(every) == [2, 4, 6, 8]
    assert steps(kept) == [8]


def test_seconds_are_logged_and_shown_in_the_record(tmp_path):
    recorder = NormRecorder(when="fit_end")
    run(tmp_path, [recorder], logger=CSVLogger(tmp_path, name="log", version=0), log_every_n_steps=1)
    table = (tmp_path / "log" / "version_0" / "metrics.csv").read_text().splitlines()
    column = table[0].split(",").index("influence/norms/seconds")
    [logged] = [float(row.split(",")[column]) for row in table[1:] if row.split(",")[column]]
    assert logged >= recorder.records[0].seconds > 0


# -- refusals


def test_two_recorders_need_two_names(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `NormRecorder`"):
        trainer(tmp_path, [NormRecorder(), NormRecorder(when="fit_end")])
    with pytest.raises(MisconfigurationException, match="another recorder writes into the same folder"):
        run(tmp_path, [NormRecorder(), Failing()])
    run(tmp_path, [NormRecorder(), NormRecorder(name="other")], max_epochs=1)
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "influence").iterdir()) == ["norms", "other"]


def test_a_failing_recording_says_where_and_what_to_do(tmp_path):
    path = str(tmp_path / "step=3.ckpt")
    with pytest.raises(RuntimeError) as raised:
        run(tmp_path, [Failing(), every_step(tmp_path, 3)])
    text = str(raised.value)
    assert "Failing(name='norms') failed at step 3 (checkpoint): ValueError: example 3 has no label." in text
    assert f"continue with `trainer.fit(..., ckpt_path='{path}')`" in text
    assert isinstance(raised.value.__cause__, ValueError)
    assert not list(tmp_path.rglob("step=00*"))


def test_checks_run_before_the_first_step(tmp_path):
    class Checking(NormRecorder):
        def check(self, recording: Recording) -> None:
            assert not recording.model.training
            raise ValueError("query 2 has no target.")

    with pytest.raises(ValueError, match="query 2 has no target"):
        run(tmp_path, [Checking()])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_manual_optimisation_needs_an_explicit_loss(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"Manual optimises manually.*Expected `loss=`"):
        run(tmp_path, [NormRecorder()], Manual)
    recorder = NormRecorder(loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"))
    run(tmp_path, [recorder], Manual, max_epochs=1)
    assert steps(recorder) == [4]


def test_waiting_for_checkpoints_that_never_come(tmp_path):
    with pytest.warns(UserWarning, match="the Trainer has no checkpoint callback"):
        run(tmp_path, [NormRecorder(when="checkpoint")], enable_checkpointing=False)


@pytest.mark.parametrize("when", ["checkpoint", "both"])
def test_averaged_weights_in_the_file_are_pointed_out(when, tmp_path):
    averaging = EMAWeightAveraging(decay=0.5)
    with pytest.warns(UserWarning, match="saves averaged weights, while the live ones are recorded"):
        run(tmp_path, [NormRecorder(when=when), averaging], max_epochs=1)


def test_weights_at_the_end_are_the_averaged_ones(tmp_path):
    recorder = NormRecorder(when="fit_end")
    model, _ = run(tmp_path, [EMAWeightAveraging(decay=0.5), recorder], max_epochs=1)
    assert recorder.records[0].weights == model_fingerprint(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when": "epoch"}, r"`NormRecorder\(when='epoch'\)`: expected one of \('checkpoint', 'fit_end', 'both'\)"),
        ({"keep": "best"}, r"`NormRecorder\(keep='best'\)`: expected one of"),
        ({"batch_size": 0}, r"`NormRecorder\(batch_size=0\)`: expected an int >= 1"),
        ({"name": "a/b"}, r"`NormRecorder\(name='a/b'\)`: expected the name of a folder"),
        ({"name": "last.ckpt"}, "expected the name of a folder"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NormRecorder(**arguments)


# -- the other namespace


def test_runs_in_a_trainer_of_pytorch_lightning(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    recorder = NormRecorder()
    saver = pl.callbacks.ModelCheckpoint(dirpath=str(tmp_path), every_n_train_steps=3, save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(accelerator="cpu", max_epochs=2, callbacks=[recorder, saver], **quiet).fit(Net(), loader())
    assert steps(recorder) == [3, 6, 8]
