from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_influence.callbacks import records
from lightning_influence.callbacks.records import Record, find_records


def write(root: Path, step: int, checkpoint: str | None = None, text: str = "") -> Record:
    temporary = records.unfinished(root, step)
    records.begin(temporary)
    (temporary / "data").write_text(text)
    record = Record(records.folder(root, step), step, "checkpoint", checkpoint, "abc", 0.5)
    records.finish(temporary, record)
    return record


def test_round_trip_in_order_of_steps(tmp_path):
    written = [write(tmp_path, step, f"{step}.ckpt") for step in (100, 9, 20)]
    assert find_records(tmp_path) == sorted(written, key=lambda record: record.step)
    assert [r.path.name for r in find_records(tmp_path)] == ["step=00000009", "step=00000020", "step=00000100"]
    assert find_records(tmp_path / "nowhere") == []


def test_a_newer_recording_replaces_the_older_whole(tmp_path):
    write(tmp_path, 3, text="old")
    (records.folder(tmp_path, 3) / "more").write_text("old")
    write(tmp_path, 3, text="new")
    [record] = find_records(tmp_path)
    assert (record.path / "data").read_text() == "new"
    assert not (record.path / "more").exists()


def test_unfinished_ones_do_not_count_and_are_swept(tmp_path):
    write(tmp_path, 3)
    temporary = records.unfinished(tmp_path, 4)
    records.begin(temporary)
    (temporary / records.RECORD_FILE).write_text("{}")
    assert [r.step for r in find_records(tmp_path)] == [3]
    records.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=00000003"]


def test_pruning_follows_the_checkpoints(tmp_path):
    kept, late, last = (str(tmp_path / name) for name in ("kept.ckpt", "late.ckpt", "last.ckpt"))
    for step, path in [(1, str(tmp_path / "gone.ckpt")), (2, kept), (3, last), (4, last), (5, late), (6, None)]:
        write(tmp_path, step, path)
    Path(kept).touch()
    Path(last).touch()
    records.prune(tmp_path, {late})  # still being written
    assert [r.step for r in find_records(tmp_path)] == [2, 4, 5, 6]


def test_a_future_format_is_refused(tmp_path):
    record = write(tmp_path, 1)
    file = record.path / records.RECORD_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    with pytest.raises(ValueError, match="expected a record of version 1, found 2; update lightning_influence"):
        find_records(tmp_path)
