from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
import torch

from lightning_influence.evaluation.retraining import Retraining
from tests.evaluation.retraining_cases import Counted, failing, model, sums, told, weight

SUBSETS = [(0, 1), (5,), (2, 3, 4)]
EXPECTED = torch.tensor([[sums(ids, seed) for seed in (0, 1)] for ids in SUBSETS], dtype=torch.float64)


def retraining(train=sums, **options):
    return Retraining(train, progress=False, **options)


def test_every_subset_with_every_seed():
    assert torch.equal(retraining().losses(SUBSETS, 2), EXPECTED)
    assert torch.equal(retraining().losses(SUBSETS, [1, 0]), EXPECTED.flip(1))
    assert retraining(lambda ids, seed: torch.tensor(2.0)).losses(SUBSETS, 2).shape == (3, 2, 1)


def test_ids_of_tensors_and_arrays_are_plain_and_jobs_of_one_set_are_one():
    train = Counted()
    retraining(train).losses([torch.tensor([1, 0]), np.array([0, 1])], 1)
    assert train.calls == [((1, 0), 0)]
    assert type(train.calls[0][0][0]) is int
    retraining(named := Counted(lambda ids, seed: len(ids))).losses([["a", "b"]], 1)
    assert named.calls == [(("a", "b"), 0)]


def test_losses_of_a_model():
    assert retraining(model, measure=weight).losses(SUBSETS, 2)[:, :, 0].tolist() == [[2, 3], [1, 2], [3, 4]]
    with pytest.raises(ValueError, match="returned a model; expected losses, or `measure`"):
        retraining(model).losses(SUBSETS, 2)
    with pytest.raises(ValueError, match=r"`Retraining\(train\)`: returned None; expected a loss"):
        retraining(lambda ids, seed: None).losses(SUBSETS, 2)
    with pytest.raises(ValueError, match=r"`Retraining\(measure\)`: returned None; expected a loss"):
        retraining(model, measure=lambda trained: None).losses(SUBSETS, 2)


def test_processes_give_the_same_with_one_thread_each():
    found = retraining(told, workers=2).losses(SUBSETS, 2)
    assert torch.equal(found[..., :2], EXPECTED)
    assert set(found[..., 2].flatten().tolist()) == {1}
    assert os.getpid() not in found[..., 3].flatten().tolist()


def test_what_a_training_raises_comes_through(tmp_path):
    with pytest.raises(RuntimeError, match="no memory left"):
        retraining(failing, path=tmp_path / "x.jsonl").losses([(0,)], 3)
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 2  # the head, and the seed before


@pytest.mark.parametrize("stop", range(6))
def test_a_killed_run_goes_on(tmp_path, stop):
    path = tmp_path / "deep" / "losses.jsonl"
    with pytest.raises(KeyboardInterrupt):
        retraining(Counted(stop=stop), path=path).losses(SUBSETS, 2)
    with path.open("a") as file:
        file.write('{"key": "cut off')
    train = Counted()
    assert torch.equal(retraining(train, path=path).losses(SUBSETS, 2), EXPECTED)
    assert len(train.calls) == 6 - stop
    more = Counted()
    found = retraining(more, path=path).losses([(7, 8), *SUBSETS], 3)
    assert torch.equal(found[1:, :2], EXPECTED)
    assert len(more.calls) == 12 - 6
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 1 + 12
    assert {(line["examples"], line["seed"]) for line in lines[1:]} == {(k, s) for k in (1, 2, 3) for s in range(3)}


def test_a_head_that_was_cut_off_is_written_again(tmp_path):
    path = tmp_path / "losses.jsonl"
    path.write_text('{"form')
    assert torch.equal(retraining(path=path).losses(SUBSETS, 2), EXPECTED)
    assert torch.equal(retraining(Counted(stop=0), path=path).losses(SUBSETS, 2), EXPECTED)


def test_a_file_of_other_trainings_is_refused(tmp_path):
    path = tmp_path / "losses.jsonl"
    retraining(path=path, settings={"epochs": 3}).losses(SUBSETS, 1)
    with pytest.raises(ValueError, match=r'of other trainings: .*"epochs": 3.*expected .*"epochs": 4'):
        retraining(path=path, settings={"epochs": 4}).losses(SUBSETS, 1)
    with pytest.raises(ValueError, match="gave 1 losses, others 2"):
        retraining(lambda ids, seed: 0.0, path=path, settings={"epochs": 3}).losses(SUBSETS, 2)
    with pytest.raises(ValueError, match=r"that is a folder\. Expected the path of a file"):
        retraining(path=tmp_path).losses(SUBSETS, 1)


@pytest.mark.parametrize("loss", [math.nan, math.inf, []])
def test_losses_that_are_none(loss):
    with pytest.raises(
        ValueError, match=r"training on 1 examples \(id 4\) with seed 7 gave .*; expected finite losses"
    ):
        retraining(lambda ids, seed: loss).losses([(4,)], [7])


@pytest.mark.parametrize(
    ("subsets", "seeds", "message"),
    [
        ([], 1, "expected at least one set of ids"),
        ([(0,), ()], 1, "each once; set 1 has"),
        ([(0, 0)], 1, "set 0 has ids 0, 0"),
        ([(0,)], 0, r"\(seeds=0\)`: expected an int >= 1, or different ints"),
        ([(0,)], [1, 1], "different ints"),
        ([(0,)], [0.5], "different ints"),
    ],
)
def test_what_cannot_be_trained_on(subsets, seeds, message):
    with pytest.raises(ValueError, match=message):
        retraining(Counted(stop=0)).losses(subsets, seeds)


def test_arguments_are_checked_at_once():
    with pytest.raises(ValueError, match=r"\(train=3\)`: expected a function"):
        retraining(3)
    with pytest.raises(ValueError, match=r"\(measure='loss'\)`: expected a function"):
        retraining(measure="loss")
    with pytest.raises(ValueError, match=r"\(workers=0\)`: expected an int >= 1"):
        retraining(workers=0)
    with pytest.raises(ValueError, match="cannot be sent to other processes"):
        retraining(lambda ids, seed: 0.0, workers=2)
