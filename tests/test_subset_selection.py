"""The example over sizes of a selection, on a small part of its data."""

from __future__ import annotations

import gzip
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))  # as for a script that runs there

import subset_selection
from subset_selection import Chooser, Parts, Result, Setting

from lightning_influence import DataSelector, Newton

SMALL = Setting(pool=200, targets=30, held_out=100, sizes=(25, 50), warm_up=10, steps=20)


def lines(printed: str) -> dict[tuple[int, str], dict[str, Any]]:
    """What the last line says, by rows and method."""
    label, _, content = printed.strip().splitlines()[-1].partition(" ")
    assert label == "RESULT"
    return {(line["rows"], line["method"]): line for line in json.loads(content)["lines"]}


@pytest.mark.parametrize("options", [[], ["--landmarks", "0"], ["--targets", "20"]])
def test_every_method_at_every_size(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(subset_selection.SETTINGS, "digits", SMALL)
    subset_selection.main(["--quick", *options])
    found = lines(capsys.readouterr().out)
    expected = {(size, method) for size in (25, 50) for method in subset_selection.METHODS} | {(200, "whole pool")}
    assert set(found) == expected
    assert found[200, "whole pool"]["wrong"] == 0.2
    assert all(0 < line["loss"] < 20 and 0 <= line["entropy"] < 2.303 for line in found.values())
    assert found[25, "newton"]["wrong"] < found[25, "random"]["wrong"]


def test_jobs_seeds_sizes_and_methods(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes find what one does, to the last digit; a seed has its own result whichever comes first."""
    monkeypatch.setitem(subset_selection.SETTINGS, "digits", SMALL)
    asked = ["--networks", "1", "--methods", "random", "basu", "random", "--sizes", "75", "--noise", "0"]
    printed = []
    for options in (["--seeds", "2"], ["--seeds", "2", "--jobs", "2"]):
        subset_selection.main([*asked, "--first-seed", "3", *options])
        printed.append(capsys.readouterr().out)
    assert lines(printed[0]) == lines(printed[1])
    assert set(lines(printed[0])) == {(75, "random"), (75, "basu"), (200, "whole pool")}
    for text in printed:
        assert sorted(line.split(":")[0] for line in text.splitlines()[:2]) == [
            f"digits, noise 0, seed {seed}" for seed in (3, 4)
        ]
    single = []
    for seed in ("3", "4"):
        subset_selection.main([*asked, "--first-seed", seed, "--seeds", "1"])
        single.append(lines(capsys.readouterr().out))
    for key, line in lines(printed[0]).items():
        assert line["loss"] == pytest.approx(sum(one[key]["loss"] for one in single) / 2, abs=1e-4)


def test_other_ways_than_the_defaults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(subset_selection.SETTINGS, "digits", SMALL)
    monkeypatch.setattr(subset_selection, "RIDGES", (0.03, 0.3))
    subset_selection.main(["--quick", "--sizes", "25", "--methods", "newton", *subset_selection.MORE])
    found = lines(capsys.readouterr().out)
    assert set(found) == {(25, "newton"), *((25, method) for method in subset_selection.MORE), (200, "whole pool")}
    kinds = [found[25, method]["loss"] for method in ("newton-raw", "newton")]
    assert found[25, "normalise-held-out"]["loss"] in kinds
    assert "below_random" not in found[25, "newton"]


@pytest.mark.parametrize("landmarks", [None, 20])
def test_newton_is_what_a_data_selector_does(landmarks: int | None) -> None:
    parts = Parts.draw(*subset_selection.load("digits", None), SMALL, 0.2, seed=1)
    warm = subset_selection.train(parts.pool, range(200), 10, 1001, settle=False)
    expected = Chooser(warm, parts, 0, Namespace(landmarks=landmarks)).selection("newton", 50)
    rule = Newton(landmarks=1.0 if landmarks is None else landmarks)
    found = DataSelector(parts.pool, parts.targets, 50, rule=rule).select(warm, progress=False)
    assert found.to_dict() == expected.to_dict()
    assert found.screened > 10


def result(loss: float, seed: int, method: str, rows: int) -> Result:
    return Result(0.2, seed, method, rows, loss, 2.0, 0.1)


def test_differences_are_taken_seed_by_seed() -> None:
    losses = {("random", 50): (0.9, 1.5, 1.2), ("newton", 50): (0.7, 1.3, 1.0), ("whole pool", 200): (0.8, 1.3, 0.9)}
    results = [result(loss, seed, *key) for key, own in losses.items() for seed, loss in enumerate(own)]
    found = {line["method"]: line for line in subset_selection.table(results)}
    assert found["newton"]["loss"] == 1.0
    assert found["newton"]["below_random"] == 0.2
    assert found["newton"]["seeds"] == {0: 0.7, 1: 1.3, 2: 1.0}
    assert found["newton"]["below_random_interval"] == [0.2, 0.2]
    low, high = found["newton"]["below_whole_interval"]
    assert low < 0 < high
    assert found["newton"]["below_whole"] == 0.0
    assert "below_random" not in found["random"]
    assert "below_random" not in found["whole pool"]
    assert "below_random_interval" not in subset_selection.table(results[::3])[1]


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def test_files_of_the_original_format(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images, labels = generator.integers(256, size=(20, 4, 4)), generator.integers(10, size=20)
    (tmp_path / "mnist").mkdir()
    write_idx(tmp_path / "mnist" / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "mnist" / "train-labels-idx1-ubyte.gz", labels)
    x, y = subset_selection.load("mnist", tmp_path)
    assert x.shape == (20, 16)
    np.testing.assert_allclose(x.numpy(), images.reshape(20, 16) / 255, rtol=1e-6)
    assert y.tolist() == labels.tolist()


def test_without_the_files() -> None:
    with pytest.raises(
        SystemExit, match="--set mnist: expected --data DIR or LI_DATA, a folder that holds mnist/train"
    ):
        subset_selection.load("mnist", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--noise", "2"], "--noise as shares, such as 0.2"),
        (["--jobs", "0"], "--jobs >= 1"),
        (["--first-seed", "-1"], "--first-seed >= 0, got -1"),
        (["--targets", "0"], "expected --targets from 1 to 300, got 0"),
        (["--targets", "301"], "expected --targets from 1 to 300, got 301"),
        (["--sizes", "60"], "--sizes as multiples of 25, the batch, up to 1000 rows"),
        (["--sizes", "1025"], "--sizes as multiples of 25, the batch, up to 1000 rows"),
        (["--methods", "best"], "invalid choice: 'best'"),
    ],
)
def test_options_that_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        subset_selection.parse(options)
    assert message in " ".join(capsys.readouterr().err.split())
