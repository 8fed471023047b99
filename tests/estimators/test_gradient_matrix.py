"""Projected gradients in a file: the same numbers as in memory, whatever happens on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_influence import GradientMatrix, InteractionGreedy, LoGra, ProjectedDot
from lightning_influence.errors import StoreError
from lightning_influence.estimators import gradient_matrix as module
from lightning_influence.estimators.gradient_matrix import write_matrix
from tests.curvature.models import Tokens, mlp, points, ready, texts


def batches(vectors: Tensor, size: int, started: list[int] | None = None, die_at: int | None = None) -> module.Work:
    """Rows of a matrix from the last to the first."""

    def work(done: int) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.arange(len(vectors)).flip(0).split(size)
        for count, part in enumerate(rows[done:], start=done):
            if started is not None:
                started.append(count)
            if count == die_at:
                raise KeyboardInterrupt
            yield part, vectors[part]

    return work


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("batch_positions", [None, 12])
@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_the_file_holds_what_project_returns(
    tmp_path: Path, normalise: bool, batch_positions: int | None, labels: Any
) -> None:
    estimator = ProjectedDot(ready(Tokens()), LoGra((2, 3)), normalise=normalise, batch_size=4, progress=False)
    expected = estimator.project(texts(9), labels=labels)
    if normalise:
        expected = torch.nn.functional.normalize(expected, dim=1)
    options: dict[str, Any] = {"batch_positions": batch_positions, "labels": labels}
    exact = estimator.write(texts(9), tmp_path / "exact.npy", dtype=torch.float64, **options)
    torch.testing.assert_close(exact.values, expected.double(), rtol=1e-10, atol=1e-12)
    half = estimator.write(texts(9), tmp_path / "half.npy", **options)
    assert half.values.dtype == torch.float16
    assert half.path.stat().st_size - 2 * expected.numel() < 256  # n k numbers of two bytes and a header
    torch.testing.assert_close(half.values, exact.values.half())


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH", 2)
    vectors = torch.randn(11, 3)
    settings = {"model": "a"}
    whole = write_matrix(tmp_path / "whole.npy", range(11), 3, torch.float32, settings, batches(vectors, 2))
    killed = tmp_path / "killed.npy"
    with pytest.raises(KeyboardInterrupt):
        write_matrix(killed, range(11), 3, torch.float32, settings, batches(vectors, 2, die_at=5))
    with pytest.raises(StoreError, match=r"no finished matrix. A run that was killed goes on"):
        GradientMatrix.open(killed)
    with pytest.raises(StoreError, match=r"model: stored 'a', asked 'b'"):
        write_matrix(killed, range(11), 3, torch.float32, {"model": "b"}, batches(vectors, 2))
    started: list[int] = []
    found = write_matrix(killed, range(11), 3, torch.float32, settings, batches(vectors, 2, started))
    assert started == [4, 5]  # what was flushed is not computed again
    assert torch.equal(found.values, vectors)
    assert found.path.read_bytes() == whole.path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}.npy{end}" for name in ("killed", "whole") for end in ("", ".json")
    ]


def test_what_is_there_is_returned_and_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = mlp(), tmp_path / "pool.npy"
    estimator = ProjectedDot(model, LoGra((2, 3)), normalise=True, progress=False)
    first = estimator.write(points(9), path)
    with monkeypatch.context() as patch:
        patch.setattr(ProjectedDot, "_records", lambda *a: pytest.fail("computed again"))
        again = estimator.write(points(9), path)
        assert torch.equal(again.values, first.values)
        for other, data, text in (
            (ProjectedDot(model, LoGra((2, 3), seed=1), normalise=True), points(9), "vectors: stored"),
            (ProjectedDot(model, LoGra((2, 3))), points(9), "vectors: stored"),
            (estimator, points(8), r"shape: stored \[9"),
            (estimator, points(9, seed=5), "data: stored"),
        ):
            with pytest.raises(StoreError, match=text):
                other.write(data, path)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        with pytest.raises(StoreError, match="model: stored"):
            estimator.write(points(9), path)
    changed = first.values
    changed[:] = 0
    assert torch.equal(GradientMatrix.open(path).values, again.values)  # a change stays in memory


def test_selection_reads_it_where_it_lies(tmp_path: Path) -> None:
    matrix = ProjectedDot(mlp(), LoGra((2, 3)), normalise=True, progress=False).write(points(9), tmp_path / "pool.npy")
    values = torch.linspace(0.1, 0.9, 9)
    found = InteractionGreedy().select(values, matrix.values, budget=4)
    assert found.ids == InteractionGreedy().select(values, matrix.values.clone(), budget=4).ids


def test_the_path_of_a_folder_is_refused_before_any_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"that is a folder\. Expected the path of a file, such as pool\.npy"):
        ProjectedDot(mlp(), LoGra((2, 3)), progress=False).write(points(9), tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    large = torch.ones(6, 2)
    large[2, 1] = 1e5
    with pytest.raises(ValueError, match=r"1 examples do not fit .* \(ids \[2\], largest number 1e\+05"):
        write_matrix(tmp_path / "large.npy", range(6), 2, torch.float16, {}, batches(large, 3))
    assert not list(tmp_path.iterdir())  # nothing is left that another dtype would stumble over
    found = write_matrix(tmp_path / "large.npy", range(6), 2, torch.float32, {}, batches(large, 3))
    assert torch.equal(found.values, large)
    small = torch.ones(6, 2)
    small[4] = 1e-8
    with pytest.warns(UserWarning, match=r"1 of 6 vectors are too short for torch.float16"):
        found = write_matrix(tmp_path / "small.npy", range(6), 2, torch.float16, {}, batches(small, 3))
    assert np.load(found.path)[4].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16\)`: expected one of"):
        write_matrix(tmp_path / "x.npy", range(6), 2, torch.bfloat16, {}, batches(small, 3))
