"""Parts of ranks become one recording, and a killed one goes on where it stopped."""

from __future__ import annotations

import pytest
import torch

from lightning_influence.callbacks.candidate_dots import FOLDER, joined
from lightning_influence.callbacks.gradient_dot_recorder import GradientDotRecorder
from lightning_influence.capture.gradient_capture import GradientCapture
from lightning_influence.estimators import pair_dots
from lightning_influence.estimators.component_dots import ComponentDots
from lightning_influence.store import Store
from tests.callbacks.toys import data, every_step, run

QUERIES = data(4, seed=9)
USED_FOLDER = pytest.mark.filterwarnings("ignore:Checkpoint directory")
CANDIDATES = [[3, 1, 2], [1, 7, 4, 5], [12, 0], [15, 14, 13]]


def part(queries, candidates) -> ComponentDots:
    """δ_c(q, i) = 100 c + 10 q + i, so that every number says where it belongs."""
    ids = sorted({i for row in candidates for i in row})
    pairs = [(a, ids.index(i)) for a, row in enumerate(candidates) for i in row]
    values = [[100.0 * c + 10 * q + i for q, row in zip(queries, candidates, strict=True) for i in row] for c in (0, 1)]
    return ComponentDots(
        components=("a", "b"),
        sizes=(1, 2),
        query_ids=tuple(queries),
        train_ids=tuple(ids),
        pairs=torch.tensor(pairs),
        dots=torch.tensor(values),
        query_squares=torch.tensor([[100.0 * c + q for q in queries] for c in (0, 1)]),
        train_squares=torch.tensor([[100.0 * c + i for i in ids] for c in (0, 1)]),
        formula="f",
        reduction="sum",
    )


def test_parts_are_joined_in_the_order_of_the_queries():
    candidates = [[5, 2], [9], [2, 7, 5], [9, 1]]
    expected = part([0, 1, 2, 3], candidates)
    found = joined([part([0, 2], candidates[::2]), part([1, 3], candidates[1::2])], [0, 1, 2, 3])
    assert found.candidates() == candidates
    for name in ("components", "sizes", "query_ids", "train_ids", "formula", "reduction"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("pairs", "dots", "query_squares", "train_squares"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


class Killed(RuntimeError):
    """In place of a kill, which runs no clean-up: folders are as a kill leaves them."""


def recorded(folder, monkeypatch=None, after=None, ckpt_path=None, candidates=CANDIDATES):
    """Number of examples passed while recording at step 4, and the recorder; killed after some of them."""
    recorder = GradientDotRecorder(QUERIES, candidates, when="checkpoint", batch_positions=1, memory_budget=2000)
    passed = []
    if monkeypatch is not None:
        record = GradientCapture.record

        def counted(self, batch, losses, ids=None, *args, **kwargs):
            if recorder.busy:
                if after is not None and len(passed) >= after:
                    raise Killed
                passed.append(ids.tolist())
            yield from record(self, batch, losses, ids, *args, **kwargs)

        original = GradientDotRecorder.record

        def watched(self, recording):
            self.busy = True
            original(self, recording)

        monkeypatch.setattr(GradientDotRecorder, "busy", False, raising=False)
        monkeypatch.setattr(GradientCapture, "record", counted)
        monkeypatch.setattr(GradientDotRecorder, "record", watched)
    run(folder, [recorder, every_step(folder, 4)], max_epochs=1 if ckpt_path is None else 2, ckpt_path=ckpt_path)
    return passed, recorder


def numbers(record) -> ComponentDots:
    return ComponentDots.load(Store.open(record.path))


@USED_FOLDER
@pytest.mark.parametrize(
    ("candidates", "damaged"), [(CANDIDATES, False), (CANDIDATES, True), (CANDIDATES[::-1], False)]
)
def test_a_killed_recording_goes_on_where_it_stopped(candidates, damaged, tmp_path, monkeypatch):
    monkeypatch.setattr(pair_dots, "SHARD", 2)
    with monkeypatch.context() as patch:
        every, whole = recorded(tmp_path / "whole", patch)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="Killed"):
        recorded(tmp_path / "killed", patch, after=10)
    root = tmp_path / "killed" / "influence" / "gradient_dot"
    assert [path.name for path in (root / FOLDER).iterdir()] == ["step=00000004"]
    for file in root.rglob("*.safetensors") if damaged else ():
        file.write_bytes(file.read_bytes()[::-1])
    with monkeypatch.context() as patch:
        ckpt_path = str(next((tmp_path / "killed").glob("*.ckpt")))
        passed, recorder = recorded(tmp_path / "killed", patch, ckpt_path=ckpt_path, candidates=candidates)
    left, right = numbers(whole.records[0]), numbers(recorder.records[0])
    assert not (root / FOLDER).exists()
    at_step_4 = len(passed) - len(every)  # step 8 is recorded too, from the beginning
    if candidates is not CANDIDATES:
        assert at_step_4 == len(every)
        assert right.candidates() == candidates
        return
    assert at_step_4 > len(every) if damaged else 0 < at_step_4 < len(every)
    for name in ("pairs", "dots", "query_squares", "train_squares"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


@USED_FOLDER
def test_what_was_kept_goes_with_the_training(tmp_path):
    recorder = GradientDotRecorder(QUERIES, CANDIDATES, when="checkpoint")
    old = tmp_path / "influence" / "gradient_dot" / FOLDER / "step=00000099" / "rank=0-of-1"
    old.mkdir(parents=True)
    run(tmp_path, [recorder, every_step(tmp_path, 4)], max_epochs=1)
    assert sorted(p.name for p in recorder.root.iterdir()) == ["step=00000004"]
