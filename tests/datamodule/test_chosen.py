"""Positions that know their pool."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lightning_influence.datamodule.chosen import Chosen, plain_positions
from lightning_influence.selection import Constraints, Random, TopK
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
    with pytest.raises(ValueError, match=r"position 4 lies outside .* has 4 examples\. Expected positions from 0 to 3"):
        loose.found_in(numbered(4))


def test_weights_stay_with_their_positions(tmp_path):
    chosen = Chosen((4, 1, 6))
    weighed = chosen.weighed({1: 2, 6: 0.5, 4: 0})
    assert (weighed.weights, weighed.weights_of_ids, chosen.weights_of_ids) == ((0.0, 2.0, 0.5), [2.0, 0.0, 0.5], None)
    assert Chosen.read(weighed.write(tmp_path / "rows.json")).weights == weighed.weights
    assert weighed.weighed(None).weights is None
    before = {name: value for name, value in chosen.to_dict().items() if name != "weights"}
    assert Chosen.from_dict(before).to_dict() == chosen.to_dict()  # files of earlier versions


def test_weights_from_gains():
    selection = TopK().select(torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64), budget=3)
    assert Chosen.of(selection).weighed("gains").weights_of_ids == [3.0, 0.0, 2.0]
    worse = TopK().select(torch.tensor([-1.0, -2.0]), budget=2)
    with pytest.raises(
        ValueError, match=r"`DataSelector.weigh\('gains'\)`: none of the 2 picks is predicted to lower the target loss"
    ):
        Chosen.of(worse).weighed("gains")


def test_an_empty_selection_is_not_served():
    stopping = Constraints(stop_if_negative_gain=True)
    empty = TopK().select(torch.tensor([-1.0, -2.0]), budget=2, constraints=stopping)
    with pytest.raises(ValueError, match=r"the selection is empty, .* stop_if_negative_gain=True\. Leave that out"):
        Chosen.of(empty)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({4: 1.0}, r"one for each selected position; not on both sides: \[1\]"),
        ({4: 1.0, 1: -1.0}, r"expected finite numbers >= 0, not all of them 0; got \[1.0, -1.0\]"),
        ({4: 1.0, 1: float("nan")}, "expected finite numbers >= 0"),
        ({4: 0, 1: 0}, "not all of them 0"),
        ("gains", r"`DataSelector.weigh\('gains'\)`: only positions were given"),
        ("loss", r"`DataSelector.weigh\(weights='loss'\)`: expected 'gains' or None"),
    ],
)
def test_weights_that_do_not_fit(weights, message):
    with pytest.raises(ValueError, match=message):
        Chosen((4, 1)).weighed(weights)


def test_positions_are_plain():
    assert json.dumps(plain_positions(np.array([2, 0]))) == "[2, 0]"
    assert plain_positions(torch.tensor([2, 0])) == (2, 0)


@pytest.mark.parametrize("ids", [[1.5], ["3"], [True, False], torch.tensor([False, True])])
def test_what_are_no_positions(ids):
    with pytest.raises(ValueError, match=r"expected positions in the training data, as ints\. Got a "):
        plain_positions(ids)
