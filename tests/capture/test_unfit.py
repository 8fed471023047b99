from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_influence.capture import ClassificationLoss, ExampleLoader, GradientCapture
from lightning_influence.capture.sampling import Uniforms
from lightning_influence.capture.unfit import MOST, UnfitExamplesError, collated, run_batch
from lightning_influence.errors import NotFittedError, UnsupportedLayerError

TABLE = nn.Embedding(10, 2)
IDS = torch.arange(100, 140)


def tokens(bad: Sequence[int], n: int = 40) -> Tensor:
    found = torch.arange(n) % 10
    found[list(bad)] = 10
    return found


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ([37], r"1 of 40 rows \(ids \[137\]\)"),
        ([0], r"1 of 40 rows \(ids \[100\]\)"),
        ([3, 4, 39], r"3 of 40 rows \(ids \[103, 104, 139\]\)"),
        (range(MOST), r"8 of 40 rows \(ids \[100, .*, 107\]\)"),
        (range(1, 30), r"at least 8 of 40 rows \(ids \[101, .*, 108\]\)"),
    ],
)
def test_examples_that_the_model_cannot_take_are_named(bad: Sequence[int], told: str) -> None:
    message = rf"^the model cannot be run on {told}: IndexError: index out of range in self\. Expected inputs"
    with pytest.raises(UnfitExamplesError, match=message) as caught:
        run_batch(TABLE, tokens(bad), IDS, "rows")
    assert caught.value.ids == tuple(100 + k for k in bad)[:MOST]
    assert isinstance(caught.value.__cause__, IndexError)


def test_a_batch_that_fits_is_run_once_and_one_that_does_not_a_few_times() -> None:
    calls = []

    def run(batch: Tensor) -> Tensor:
        calls.append(len(batch))
        return TABLE(batch)

    assert torch.equal(run_batch(run, tokens([]), IDS, "rows"), TABLE(tokens([])))
    assert calls == [40]
    with pytest.raises(UnfitExamplesError):
        run_batch(run, tokens([21]), IDS, "rows")
    assert set(calls) == {40}  # what is laid out for 40 examples goes on to fit
    assert len(calls) <= 2 + 2 * math.ceil(math.log2(40))


def test_the_reason_is_that_of_the_example() -> None:
    loss, labels = ClassificationLoss(), torch.arange(40) % 3
    labels[17] = 7
    batch = {"input": torch.ones(40, 2), "labels": labels}
    model = nn.Linear(2, 3)
    with pytest.raises(UnfitExamplesError, match=r"expected labels 0 to 2, .* Got \[7\]\. Met in 1 of 40 .*\[117\]\)"):
        run_batch(lambda batch: loss.losses(model, batch), batch, IDS, "rows")
    drawn = Uniforms(IDS, 0)  # numbers for 40 examples
    with pytest.raises(UnfitExamplesError, match=r"Got \[7\]\. Met in 1 of 40 rows \(ids \[117\]\)"):
        run_batch(lambda batch: loss.sampled_losses(model, batch, drawn), batch, IDS, "rows")


def test_batches_of_other_layouts() -> None:
    def run(batch: Any) -> Any:
        if 3 in batch["x"] or "d" in batch["names"] or 3 in batch["array"]:
            raise KeyError("d")

    batch = {"x": torch.arange(5), "names": list("abcde"), "array": np.arange(5), "scale": 2.0}
    with pytest.raises(UnfitExamplesError, match=r"1 of 5 rows \(ids \[3\]\): KeyError: 'd'"):
        run_batch(run, batch, None, "rows")


def test_where_no_example_is_to_blame_alone_the_batch_is_named() -> None:
    def together(batch: Tensor) -> None:
        if len(batch.unique()) > 6:
            raise RuntimeError("too many")

    told = r"a batch of 10 rows \(ids \[100, .*, 107\], \.\.\.\): RuntimeError: too many\. Expected"
    with pytest.raises(UnfitExamplesError, match=told) as caught:
        run_batch(together, torch.arange(10), IDS[:10], "rows")
    assert caught.value.ids == tuple(range(100, 110))

    def always(batch: Any) -> None:
        raise TypeError("no such thing")

    uncut = {"x": torch.ones(3), "shared": torch.ones(2)}
    with pytest.raises(UnfitExamplesError, match=r"a batch of 3 rows \(ids \[100, 101, 102\]\): TypeError"):
        run_batch(always, uncut, IDS[:3], "rows")
    with pytest.raises(UnfitExamplesError, match=r"1 of 1 rows \(ids \[100\]\): TypeError"):
        run_batch(always, torch.ones(1), IDS[:1], "rows")
    with pytest.raises(UnfitExamplesError, match=r"3 of 3 rows \(ids \[0, 1, 2\]\): TypeError"):
        run_batch(always, torch.ones(3), None, "rows")


@pytest.mark.parametrize(
    "error",
    [
        UnsupportedLayerError("x"),
        NotFittedError("x"),
        UnfitExamplesError("x", [4]),
        torch.cuda.OutOfMemoryError("x"),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("CUDA error: device-side assert triggered"),
        KeyboardInterrupt(),
        OSError("a disk"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}",
)
def test_what_is_not_about_examples_passes_as_it_is(error: BaseException) -> None:
    def run(batch: Any) -> None:
        raise error

    for work in (lambda: run_batch(run, torch.ones(4), None, "rows"), lambda: collated(run, [1, 2], [0, 1], "rows")):
        with pytest.raises(type(error)) as caught:
            work()
        assert caught.value is error
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("bad", [0, 3, 5])
def test_an_example_that_does_not_go_with_the_others_is_named(bad: int) -> None:
    rows = [(torch.ones(2 if k == bad else 3), k) for k in range(6)]
    told = rf"^1 of 6 queries \(ids \[{20 + bad}\]\) do not go into one batch with the others: RuntimeError: stack"
    with pytest.raises(UnfitExamplesError, match=told) as caught:
        list(ExampleLoader([(torch.zeros(3), 0)] * 20 + rows, 6, indices=range(20, 26), what="queries"))
    assert caught.value.ids == (20 + bad,)
    assert len(list(ExampleLoader(rows, 1))) == 6


def test_examples_without_a_key_and_pairs_that_do_not_tell() -> None:
    rows: list[Any] = [{"x": k, "y": k} for k in range(5)]
    del rows[2]["y"]
    with pytest.raises(UnfitExamplesError, match=r"1 of 5 examples \(ids \[2\]\) do not go into .*: KeyError: 'y'"):
        collated(default_collate, rows, range(5), "examples")
    with pytest.raises(
        UnfitExamplesError, match=r"^2 rows \(ids \[0, 1\]\) do not go into one batch: .* Expected rows"
    ):
        collated(default_collate, [torch.ones(2), torch.ones(3)], [0, 1], "rows")


def test_a_capture_names_them_and_records_the_next_batch() -> None:
    model = nn.Sequential(TABLE, nn.Linear(2, 1))

    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)[:, 0].square()

    with GradientCapture(model) as capture:
        with pytest.raises(UnfitExamplesError, match=r"1 of 40 pool rows \(ids \[105\]\): IndexError"):
            next(capture.record(tokens([5]), losses, IDS, what="pool rows"))
        records = list(capture.record(tokens([]), losses, IDS))
    assert [len(record.ids) for record in records] == [40, 40]
