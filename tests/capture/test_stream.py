"""A stream has positions: what is computed from it is what a map-style dataset gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import seed_everything
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence import (
    EKFAC,
    CurvatureRecorder,
    GradientDotRecorder,
    InfluenceFunction,
    Scores,
    Store,
    StreamedExamples,
)
from tests.callbacks.toys import Toy, data, trainer

LINEAR = ["net.0", "net.4"]


class Stream(IterableDataset[Any]):
    """Counts how often it is begun and how many rows it gives."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.begun, self.given = rows, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        for k in range(len(self.rows)):
            self.given += 1
            yield self.rows[k]


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6), st.booleans(), st.sampled_from([None, 10]))
def test_any_rows_in_any_order(asked, keep, length):
    rows = StreamedExamples(Stream([k * k for k in range(10)]), length, keep=keep)
    assert len(rows) == 10
    for ids in asked:
        assert rows.__getitems__(ids) == [k * k for k in ids]
    assert rows[3] == 9
    with pytest.raises(IndexError, match="row 10 of 10"):
        rows[10]


def test_one_pass_reads_a_stream_once():
    stream = Stream([None, *range(1, 12)])
    rows = StreamedExamples(stream, 8)
    for start in range(0, 8, 3):
        ids = list(range(start, min(8, start + 3)))
        assert rows.__getitems__(ids) == [k or None for k in ids]
    assert (stream.begun, stream.given) == (1, 8)
    assert rows[5] == 5
    assert (stream.begun, stream.given) == (2, 14)


def test_kept_rows_are_not_read_again():
    stream = Stream(range(6))
    rows = StreamedExamples(stream, keep=True)
    assert len(rows) == 6
    assert rows.__getitems__([4, 0, 5]) == [4, 0, 5]
    assert stream.given == 6


@pytest.mark.parametrize("hugging_face", [False, True])
def test_scores_and_factors_are_those_of_a_map_style_dataset(hugging_face):
    rows = [{"x": x.tolist(), "y": int(y)} for x, y in data()] if hugging_face else data()
    stream: Any = datasets.Dataset.from_list(rows).to_iterable_dataset() if hugging_face else Stream(data())

    def collate(found: list[Any]) -> Any:
        pairs = [(row["x"], row["y"]) if hugging_face else row for row in found]
        return torch.tensor([list(x) for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])

    seed_everything(0, verbose=False)
    model = Toy().eval()

    def scores(train: Any) -> torch.Tensor:
        loader = DataLoader(train, 5, collate_fn=collate)
        influence = InfluenceFunction(model, EKFAC(damping=0.1), components=LINEAR, progress=False).fit(loader)
        return influence.score(data(3, seed=1), loader).total()

    torch.testing.assert_close(scores(StreamedExamples(stream)), scores(rows), rtol=0, atol=0)


SKIPPED = "ignore:You defined a `validation_step`"


@pytest.mark.filterwarnings(SKIPPED)
def test_recorders_look_at_the_stream_that_is_trained_on(tmp_path):
    def recorded(train: Any, name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        options: dict[str, Any] = {"train": train, "components": LINEAR, "when": "fit_end", "batch_size": 3}
        dots, factors = (
            GradientDotRecorder(data(3, seed=1), **options),
            CurvatureRecorder(EKFAC(damping=0.1), **options),
        )
        seed_everything(0, verbose=False)
        loader = DataLoader(Stream(data()), batch_size=4)
        trainer(tmp_path / name, [dots, factors], max_epochs=1).fit(Toy(), loader)
        stores = [Store.open(recorder.records[-1].path) for recorder in (dots, factors)]
        return Scores.load(stores[0]).values, stores[1].read_curvature("curvature").state()

    torch.testing.assert_close(
        recorded(StreamedExamples(Stream(data())), "stream"), recorded(data(), "list"), rtol=0, atol=0
    )


@pytest.mark.filterwarnings(SKIPPED)
def test_a_recorder_of_a_plain_stream_says_what_to_pass(tmp_path):
    recorder = GradientDotRecorder(data(3, seed=1), components=LINEAR, when="fit_end")
    with pytest.raises(ValueError, match=r"StreamedExamples\(stream, length\)"):
        trainer(tmp_path, [recorder], max_epochs=1).fit(Toy(), DataLoader(Stream(data()), batch_size=4))


class Restless(Stream):
    """The last row is another one every time."""

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        yield from (0, 1, self.begun)


def test_a_stream_that_changes_is_refused():
    rows = StreamedExamples(Restless([]), 3)
    assert rows.__getitems__([0, 1, 2]) == [0, 1, 1]
    assert rows[1] == 1
    with pytest.raises(ValueError, match=r"gave another row 2 than before.*keep=True"):
        rows[2]


def test_rows_that_cannot_be_compared_are_told_once():
    rows = StreamedExamples(Stream([{"x": object()}, {"x": object()}]), 2)
    with pytest.warns(UserWarning, match=r"gives rows \(dict\).*cannot be checked.*keep=True"):
        rows[0]
    assert rows[1] is not rows[0]  # a second warning would be an error


def test_images_that_change_are_noticed():
    images = [Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")]
    rows = StreamedExamples(Stream(images), 2)
    assert rows[1] is images[1]
    images[0] = Image.new("RGB", (2, 2), "green")
    with pytest.raises(ValueError, match="gave another row 0 than before"):
        rows[0]


def test_a_stream_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="Stream ends after 4 rows, expected 9"):
        StreamedExamples(Stream(range(4)), 9)[6]


def test_jumping_about_is_told_once():
    rows = StreamedExamples(Stream(range(10)), 10)
    for _ in range(5):
        assert rows[9] == 9
    with pytest.warns(UserWarning, match=r"asked for out of order.*keep=True"):
        rows[9]
    assert rows[9] == 9  # a second warning would be an error


def test_copies_begin_anew():
    rows = StreamedExamples(Stream(range(10)), 10)
    assert rows[4] == 4
    assert copy.deepcopy(rows).__getitems__([5, 2]) == [5, 2]


@pytest.mark.parametrize(
    ("stream", "length", "message"),
    [
        (iter([1, 2]), None, "expected something that can be iterated again"),
        (7, None, r"StreamedExamples\(int\)"),
        ([1], 0, r"length=0\)`: expected an int >= 1"),
        ([1], True, "length=True"),
        ([1], 2.0, "length=2.0"),
    ],
)
def test_bad_input(stream, length, message):
    with pytest.raises(ValueError, match=message):
        StreamedExamples(stream, length)
