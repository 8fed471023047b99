"""A run that was killed and resumed has the recordings of one that was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.callbacks import toys
from tests.callbacks.toys import (
    Interrupted,
    NormRecorder,
    Toy,
    every_step,
    run,
    steps,
)


class Calm(Toy):
    """Without dropout, whose random state no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3].p = 0.0


class KilledAfterSaving(Calm):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == 2:
            raise KeyboardInterrupt


RESUMING = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:You're resuming from a checkpoint that ended before the epoch ended"
)


@RESUMING
@pytest.mark.parametrize("stop", [Interrupted(5), Interrupted(4, "on_train_epoch_end")])
def test_resumed_run_equals_an_uninterrupted_one(stop, tmp_path):
    whole, resumed = NormRecorder(), NormRecorder()
    run(tmp_path / "a", [whole, every_step(tmp_path / "a", 2)], Calm)
    with pytest.raises(SystemExit):
        run(tmp_path / "b", [NormRecorder(), every_step(tmp_path / "b", 2), stop], Calm)
    last = str(tmp_path / "b" / "step=4.ckpt")
    run(tmp_path / "b", [resumed, every_step(tmp_path / "b", 2)], Calm, ckpt_path=last)
    assert steps(resumed) == steps(whole) == [2, 4, 6, 8]
    for left, right in zip(whole.records, resumed.records, strict=True):
        assert left.weights == right.weights
        assert toys.read_norms(left.path) == toys.read_norms(right.path)


@RESUMING
def test_run_killed_between_saving_and_recording_catches_up(tmp_path):
    killed, resumed = NormRecorder(), NormRecorder()
    with pytest.raises(SystemExit):
        run(tmp_path, [killed, every_step(tmp_path, 2)], KilledAfterSaving)
    assert steps(killed) == []
    run(tmp_path, [resumed, every_step(tmp_path, 2)], Calm, ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert steps(resumed) == [2, 4, 6, 8]
    assert Path(resumed.records[0].checkpoint).name == "step=2.ckpt"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_recordings_before_the_resume_are_found_in_their_old_folder(tmp_path):
    run(tmp_path / "a", [NormRecorder(), every_step(tmp_path / "a", 2)], max_epochs=1)
    resumed = NormRecorder()
    last = str(tmp_path / "a" / "step=4.ckpt")
    run(tmp_path / "b", [resumed, every_step(tmp_path / "b", 2)], ckpt_path=last)
    assert steps(resumed) == [2, 4, 6, 8]
    assert [r.path.is_relative_to(tmp_path / "a") for r in resumed.records] == [True, True, False, False]


@RESUMING
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resume_without_own_state_records_from_there_on(tmp_path):
    run(tmp_path, [every_step(tmp_path, 4)], max_epochs=1)
    recorder = NormRecorder(when="checkpoint")
    run(tmp_path, [recorder, every_step(tmp_path, 2)], ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert steps(recorder) == [6, 8]


def test_state_is_json_and_loads_with_weights_only(tmp_path):
    recorder = NormRecorder(when="checkpoint")
    run(tmp_path, [recorder, every_step(tmp_path, 4)])
    state = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["callbacks"][recorder.state_key]
    assert json.loads(json.dumps(state)) == state
    assert state == {"version": 1, "roots": [str(tmp_path / "influence" / "norms")]}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_recordings_of_another_run_are_pointed_out(tmp_path):
    run(tmp_path, [NormRecorder(), every_step(tmp_path, 4)])
    with pytest.warns(UserWarning, match=r"holds recordings of another run at steps \[4, 8\]"):
        run(tmp_path, [NormRecorder(), every_step(tmp_path, 4)], max_epochs=1)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_unfinished_folders_are_swept_and_never_listed(tmp_path):
    left = tmp_path / "influence" / "norms" / "step=00000003.tmp"
    left.mkdir(parents=True)
    (left / "record.json").write_text("half")
    recorder = NormRecorder(when="fit_end")
    run(tmp_path, [recorder, every_step(tmp_path, 8)], max_epochs=1)
    assert steps(recorder) == [4]
    assert not left.exists()
