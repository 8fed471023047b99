"""Positions that know their pool."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lightning_influence.datamodule.chosen import Chosen, plain_positions
from lightning_influence.selection import Random
from tests.datamodule.toys import numbered


def test_a_file_gives_back_what_was_written(tmp_path):
    chosen = Chosen.of(Random(3).select(torch.zeros(9), budget=4)).found_in(numbered(9))
    path = chosen.write(tmp_path / "new" / "rows.json")
    again = Chosen.read(path)
    assert again.to_dict() == chosen.to_dict() == json.loads(path.read_text())
    assert again.selection.ids == chosen.selection.ids == again.positions
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]


def test_tied_to_the_first_dataset_that_it_is_found_in():
    loose = Chosen((4, 1))
    tied = loose.found_in(numbered(9))
    assert (loose.fingerprint, tied.ids) == (None, [1, 4])
    assert tied.found_in(numbered(9)).fingerprint == tied.fingerprint
    with pytest.raises(ValueError, match=r"\(9 examples, .*\) is not the pool the selection was made in"):
        tied.found_in(numbered(9, seed=1))
    with pytest.raises(ValueError, match=r"\(4 examples, .*with position 4\)"):
        loose.found_in(numbered(4))


def test_positions_are_plain():
    assert json.dumps(plain_positions(np.array([2, 0]))) == "[2, 0]"
