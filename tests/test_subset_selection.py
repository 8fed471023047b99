"""The example over sizes of a selection, on a small part of its data."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))  # as for a script that runs there

import subset_selection
from subset_selection import Setting

SMALL = Setting(pool=200, targets=30, held_out=100, sizes=(25, 50), warm_up=10, steps=20)


def lines(printed: str) -> dict[tuple[int, str], dict[str, Any]]:
    """What the last line says, by rows and method."""
    label, _, content = printed.strip().splitlines()[-1].partition(" ")
    assert label == "RESULT"
    return {(line["rows"], line["method"]): line for line in json.loads(content)["lines"]}


@pytest.mark.parametrize("gradients", ["scores", "whole"])
def test_every_method_at_every_size(
    gradients: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(subset_selection.SETTINGS, "digits", SMALL)
    subset_selection.main(["--quick", "--gradients", gradients])
    found = lines(capsys.readouterr().out)
    expected = {(size, method) for size in (25, 50) for method in subset_selection.METHODS} | {(200, "whole pool")}
    assert set(found) == expected
    assert found[200, "whole pool"]["wrong"] == 0.2
    assert all(0 < line["loss"] < 20 and 0 <= line["entropy"] < 2.303 for line in found.values())
    assert found[25, "newton"]["wrong"] < found[25, "random"]["wrong"]


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
    with pytest.raises(SystemExit):
        subset_selection.parse(["--noise", "2"])
