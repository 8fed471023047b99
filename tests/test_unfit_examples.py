"""Examples that do not fit the model are named by id wherever data are passed through it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from lightning_influence import (
    CG,
    CKA,
    EKFAC,
    TRAK,
    AdamDot,
    AdamMoments,
    CurvatureRecorder,
    DataSelector,
    FactoredProjection,
    GradientDot,
    GradientDotRecorder,
    GroupInfluence,
    Identity,
    InfluenceFunction,
    LESSRecorder,
    LossScore,
    ProjectedDot,
    RepresentationSimilarity,
    omit_nonfinite,
    select_training_data,
)
from lightning_influence.capture.unfit import UnfitExamplesError
from lightning_influence.estimators import pair_dots
from lightning_influence.store import Store
from tests.callbacks import toys
from tests.curvature.models import Tokens, mlp, points, ready, texts

SIZE, BATCH = 12, 4


def classes() -> tuple[Any, Any, int]:
    """A class that the head has not."""
    rows = points(SIZE)
    rows[9] = (rows[9][0], torch.tensor(5))
    return mlp(), DataLoader(rows, BATCH), 9


def tokens() -> tuple[Any, Any, int]:
    """A token beyond the vocabulary."""
    rows = texts(SIZE)
    rows[6] = {**rows[6], "input_ids": rows[6]["input_ids"] + 100}
    return ready(Tokens()), DataLoader(rows, BATCH), 6


def width() -> tuple[Any, Any, int]:
    """Inputs of another width, in a batch of their own."""
    rows = points(SIZE)
    rows[7] = (rows[7][0][:2], rows[7][1])
    return mlp(), DataLoader(rows, 1), 7


def mixed() -> tuple[Any, Any, int]:
    """Inputs of another width, in a batch with others."""
    model, loader, bad = width()
    return model, DataLoader(loader.dataset, BATCH), bad


def key() -> tuple[Any, Any, int]:
    """An example without its mask, which the model takes."""
    rows = texts(SIZE)
    del rows[5]["attention_mask"]
    return ready(Tokens()), DataLoader(rows, BATCH), 5


CASES = {case.__name__: case for case in (classes, tokens, width, mixed, key)}


def good(model: Any, n: int = 3) -> list[Any]:
    return texts(n, seed=9) if isinstance(model, Tokens) else points(n, seed=9)


def features(model: Any, data: Any) -> Any:
    return InfluenceFunction(model, EKFAC(), progress=False).fit(good(model, 8)).features(data)


def adam_dot(model: Any, data: Any) -> Any:
    moments = AdamMoments.fresh(model, GradientDot(model).components)
    return AdamDot(model, moments, FactoredProjection(0.5)).score(good(model), data)


def states(model: Any, data: Any) -> Any:
    """Labels have no part in it."""
    rows = [(x, y) if y < 3 else (x[:2], y) for x, y in data.dataset] if isinstance(data.dataset[0], tuple) else data
    layer = "up" if isinstance(model, Tokens) else "0"
    loader = data if rows is data else DataLoader(rows, data.batch_size)
    return RepresentationSimilarity(model, layer).score(good(model), loader)


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "EKFAC": lambda model, data: EKFAC().fit(model, data),
    "EKFAC from memory": lambda model, data: EKFAC().fit(model, data, memory_budget=1 << 20, nan_policy="omit"),
    "CG": lambda model, data: CG().fit(model, data),
    "omit_nonfinite": omit_nonfinite,
    "GradientDot.score": lambda model, data: GradientDot(model).score(good(model), data),
    "GradientDot.top": lambda model, data: GradientDot(model).top(good(model), data, 2),
    "GradientDot.self_influence": lambda model, data: GradientDot(model).self_influence(data),
    "GradientDot.score_with_self": lambda model, data: GradientDot(model).score_with_self(good(model), data),
    "GradientDot.token_scores": lambda model, data: GradientDot(model).token_scores(good(model), data),
    "GradientDot.pairs": lambda model, data: GradientDot(model).pairs(good(model), data),
    "AdamDot": adam_dot,
    "RepresentationSimilarity": states,
    "LossScore": lambda model, data: LossScore(model).score(good(model), data),
    "CKA": lambda model, data: CKA(model).score(good(model), data),
    "features": features,
    "ProjectedDot": lambda model, data: ProjectedDot(model, FactoredProjection(4)).project(data),
    "TRAK": lambda model, data: TRAK(model, FactoredProjection(4), damping_share=0.1).fit(data),
    "GroupInfluence": lambda model, data: GroupInfluence(model, Identity()).fit(data, good(model)).effects(),
    "select_training_data": lambda model, data: select_training_data(model, data, good(model), budget=2),
    "DataSelector": lambda model, data: DataSelector(data, good(model), budget=2).select(model),
}
CALLED = dict.fromkeys(("select_training_data", "DataSelector"), "pool rows")
CALLED |= dict.fromkeys(("omit_nonfinite", "ProjectedDot", "features"), "examples")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore:GradientDot.* positions")
def test_training_examples_are_named_wherever_they_are_passed(call: str, case: str) -> None:
    model, data, bad = CASES[case]()
    called = CALLED.get(call, "training examples")
    with pytest.raises(UnfitExamplesError, match=rf"1 of \d+ {called} \(ids \[{bad}\]\)") as caught:
        CALLS[call](model, data)
    assert caught.value.ids == (bad,)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_queries_are_told_from_training_examples() -> None:
    model, data, bad = classes()
    for estimator in (GradientDot(model), TRAK(model, FactoredProjection(4), damping_share=0.1).fit(good(model, 8))):
        with pytest.raises(UnfitExamplesError, match=rf"1 of 4 queries \(ids \[{bad}\]\)"):
            estimator.score(data, good(model))


def watched(estimator: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of the examples that are passed from now on."""
    seen: list[int] = []
    record = estimator.capture.record

    def noted(batch: Any, losses: Any, ids: Any, *rest: Any) -> Any:
        seen.extend(ids.tolist())
        return record(batch, losses, ids, *rest)

    monkeypatch.setattr(estimator.capture, "record", noted)
    return seen


def repaired(data: Any) -> Any:
    """Of the same rows, with a collate function that knows what to do about the class."""
    return DataLoader(data.dataset, BATCH, collate_fn=lambda rows: default_collate([(x, y % 3) for x, y in rows]))


def test_vectors_that_were_written_stay_and_the_rest_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, bad = classes()
    estimator = ProjectedDot(model, FactoredProjection(1.0), batch_size=BATCH, progress=False)
    whole = estimator.write(repaired(data), tmp_path / "whole.npy")
    with pytest.raises(UnfitExamplesError, match=rf"\(ids \[{bad}\]\)"):
        estimator.write(data, tmp_path / "rows.npy")
    seen = watched(estimator, monkeypatch)
    again = estimator.write(repaired(data), tmp_path / "rows.npy")
    assert seen == [8, 9, 10, 11]
    assert (again.values == whole.values).all()


def test_products_that_were_stored_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_dots, "SHARD", 2)
    model, data, bad = classes()
    estimator = GradientDot(model, batch_size=1, memory_budget=1500, progress=False)
    queries = points(2, seed=9)
    with monkeypatch.context() as patch:
        seen = watched(estimator, patch)
        expected, whole = estimator.pairs(queries, repaired(data), batch_positions=1), len(seen)

    def stored(data: Any) -> Any:
        store = Store.resume(tmp_path / "dots", model, estimator.components)
        return estimator.pairs(queries, data, store=store, batch_positions=1)

    with pytest.raises(UnfitExamplesError, match=rf"training examples \(ids \[{bad}\]\)"):
        stored(data)
    seen = watched(estimator, monkeypatch)
    torch.testing.assert_close(stored(repaired(data)).dots, expected.dots)
    assert 0 < len(seen) < whole


# Inside a Trainer, in which the training data are others


def bad_pool() -> TensorDataset:
    x, y = toys.data(10, seed=4).tensors
    y[7] = 5
    return TensorDataset(x, y)


def bad_loader() -> Any:
    return DataLoader(bad_pool(), BATCH)


RECORDERS: dict[str, Callable[[], Any]] = {
    "CurvatureRecorder": lambda: CurvatureRecorder(train=bad_loader()),
    "GradientDotRecorder": lambda: GradientDotRecorder(toys.data(2), train=bad_loader(), when="fit_end"),
    "LESSRecorder": lambda: LESSRecorder(
        toys.data(2), train=bad_loader(), projection=FactoredProjection(1.0), when="fit_end"
    ),
}


class Adam(toys.Toy):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize("name", RECORDERS)
def test_a_recorder_says_which_it_was_and_which_example(name: str, tmp_path: Path) -> None:
    recorder = RECORDERS[name]()
    told = rf"{name}\(name='{recorder.name}'\) failed at step 4 \(fit_end\): .*Got \[5\]\. "
    with pytest.raises(RuntimeError, match=told + r"Met in 1 of 4 training examples \(ids \[7\]\)\.") as caught:
        toys.run(tmp_path, [recorder], Adam, max_epochs=1)
    assert isinstance(caught.value.__cause__, UnfitExamplesError)
    assert caught.value.__cause__.ids == (7,)


def test_so_does_one_that_cannot_take_its_first_batch(tmp_path: Path) -> None:
    recorder = CurvatureRecorder(train=DataLoader(Subset(bad_pool(), [7, 0, 1]), BATCH), name="mine")
    told = r"^CurvatureRecorder\(name='mine'\): .* Met in 1 of 3 training examples \(ids \[0\]\)"
    with pytest.raises(UnfitExamplesError, match=told) as caught:
        toys.run(tmp_path, [recorder], max_epochs=1)
    assert caught.value.ids == (0,)
    assert not [*tmp_path.rglob("*.ckpt")]
