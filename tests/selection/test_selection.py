from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from lightning_influence.selection import HeldOutChoice, Selection, TopK

LINES = [
    {"id": "c", "rank": 0, "gain": -3.0, "first_order": -3.0, "interaction": 0.0},
    {"id": "a", "rank": 1, "gain": -2.0, "first_order": -2.0, "interaction": 0.0},
]


@pytest.fixture
def selection() -> Selection:
    return TopK().select(torch.tensor([2.0, 1.0, 3.0]), budget=2, ids=["a", "b", "c"])


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_line_per_pick(selection: Selection, tmp_path: Path) -> None:
    path = selection.to_jsonl(tmp_path / "new folder" / "picks.jsonl")
    assert lines(path) == LINES
    assert os.listdir(path.parent) == ["picks.jsonl"]


ROWS = [{"text": "eins"}, {"text": "zwei"}, {"text": "drei ß"}]


@pytest.mark.parametrize(
    "rows",
    [ROWS, Dataset.from_list(ROWS), lambda name: ROWS["abc".index(name)]],
    ids=["list", "Hugging Face", "function"],
)
def test_rows_are_the_pool(selection: Selection, tmp_path: Path, rows: object) -> None:
    path = selection.to_jsonl(tmp_path / "picks.jsonl", rows)
    assert lines(path) == [{**LINES[0], "text": "drei ß"}, {**LINES[1], "text": "eins"}]
    assert "ß" in path.read_text(encoding="utf-8")


def test_fields_named_like_ours_are_kept(selection: Selection, tmp_path: Path) -> None:
    row = {"id": 5, "row_id": 6, "gain": 7, "text": "x"}
    path = selection.to_jsonl(tmp_path / "picks.jsonl", lambda name: row)
    assert lines(path)[0] == {**LINES[0], "row_row_id": 5, "row_id": 6, "row_gain": 7, "text": "x"}


def test_numbers_and_nests(selection: Selection, tmp_path: Path) -> None:
    row = {
        "label": np.int64(3),
        "x": torch.tensor([1.0, torch.nan]),
        "turns": [{"role": "user", "n": np.float32(0.5)}, None, (True,)],
    }
    path = selection.to_jsonl(tmp_path / "picks.jsonl", lambda name: row)
    assert lines(path)[0] == {
        **LINES[0],
        "label": 3,
        "x": [1.0, None],
        "turns": [{"role": "user", "n": 0.5}, None, [True]],
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            (1, 2),
            "expected a mapping for each row. Row of id 'c' is a tuple; pass a function from id to a dict.",
        ),
        (
            {"image": object()},
            "expected values that JSON can hold. field 'image' of id 'c' is a object; pass a function from id to "
            "a dict without it.",
        ),
    ],
)
def test_a_refused_row_leaves_the_old_file(selection: Selection, tmp_path: Path, row: object, message: str) -> None:
    path = tmp_path / "picks.jsonl"
    path.write_text("old")
    with pytest.raises(ValueError, match=re.escape(f"`Selection.to_jsonl(rows)`: {message}")):
        selection.to_jsonl(path, lambda name: row)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["picks.jsonl"]


def test_a_failed_write_leaves_nothing_behind(
    selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        selection.to_jsonl(tmp_path / "picks.jsonl")
    assert os.listdir(tmp_path) == []


OPTIONAL = ("lower_bound", "weight", "held_out")


@pytest.mark.parametrize(("change", "names"), [({"gain": []}, "gain"), ({"ids": None, "idds": []}, "idds, ids")])
def test_fields_of_another_version(selection: Selection, change: dict[str, object], names: str) -> None:
    values = {**selection.to_dict(), **change}
    values = {key: value for key, value in values.items() if value is not None or key in OPTIONAL}
    message = "`Selection.from_dict`: expected the fields that `to_dict` writes. Missing or unknown: " + names + "."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Selection.from_dict(values)


@pytest.mark.parametrize("later", [{"held_out"}, {"held_out", "screened"}])
def test_records_of_earlier_versions(selection: Selection, later: set[str]) -> None:
    values = {name: value for name, value in selection.to_dict().items() if name not in later}
    assert Selection.from_dict(values).to_dict() == selection.to_dict()


def test_a_choice_by_held_out_targets_is_kept(selection: Selection) -> None:
    choice = HeldOutChoice((0.1, 0.3), torch.tensor([[0.2, 0.4], [0.1, 0.5]], dtype=torch.float64))
    found = replace(selection, held_out=choice)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["held_out"] == {"candidates": [0.1, 0.3], "explained": [[0.2, 0.4], [0.1, 0.5]]}
    again = Selection.from_dict(values)
    assert again.to_dict() == found.to_dict()
    assert again.held_out is not None
    assert again.held_out.best == 0.3
