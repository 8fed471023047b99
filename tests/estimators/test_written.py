"""Vectors of a pool in a file, here whitened gradients; `test_gradient_matrix` has projected ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_influence import (
    CG,
    EKFAC,
    Exact,
    ExampleLoader,
    GradientMatrix,
    Identity,
    InfluenceFunction,
    ProjectedGram,
)
from lightning_influence.errors import NotFittedError, StoreError
from lightning_influence.estimators import gradient_matrix
from lightning_influence.store import Store
from lightning_influence.store.fingerprint import tensors_fingerprint
from tests.curvature.models import Mixed, Tokens, mlp, points, ready, texts, token_rows

TRAIN = points(15)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    "curvature", [EKFAC(), ProjectedGram((2, 2), initialisation="pca"), Exact(), Identity()], ids=repr
)
def test_the_file_holds_the_features(tmp_path: Path, curvature: Any, normalise: bool) -> None:
    model, data = ready(Mixed()), token_rows(9)
    influence = InfluenceFunction(model, curvature, normalise=normalise, batch_size=4, progress=False).fit(data)
    expected = influence.features(data)
    exact = influence.write_features(data, tmp_path / "exact.npy", dtype=torch.float64)
    torch.testing.assert_close(exact.values, expected)
    half = influence.write_features(data, tmp_path / "half.npy")
    assert half.values.dtype == torch.float16
    assert half.path.stat().st_size - 2 * expected.numel() < 256
    torch.testing.assert_close(half.values, expected.half())


@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_in_batches_of_alike_lengths(tmp_path: Path, labels: Any) -> None:
    influence = InfluenceFunction(ready(Tokens()), EKFAC(), progress=False).fit(texts(9))
    found = influence.write_features(
        texts(9), tmp_path / "x.npy", dtype=torch.float64, batch_positions=12, labels=labels, seed=3
    )
    torch.testing.assert_close(found.values, influence.features(texts(9), labels=labels, seed=3))


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_matrix, "FLUSH", 1)
    path, whitened = tmp_path / "x.npy", InfluenceFunction._whitened
    influence = InfluenceFunction(mlp(), EKFAC(), batch_size=4, progress=False).fit(TRAIN)
    seen: list[list[int]] = []

    def dying(self: InfluenceFunction, records: Any) -> Any:
        seen.append(records[0][1].ids.tolist())
        if len(seen) == 3:
            raise KeyboardInterrupt
        return whitened(self, records)

    monkeypatch.setattr(InfluenceFunction, "_whitened", dying)
    with pytest.raises(KeyboardInterrupt):
        influence.write_features(TRAIN, path, dtype=torch.float64)
    store = Store.create(tmp_path / "store", influence.model, influence.components)
    store.write_curvature("curvature", influence.curvature)
    again = InfluenceFunction.from_store(influence.model, store, batch_size=4, progress=False)
    found = again.write_features(TRAIN, path, dtype=torch.float64)
    assert sorted(k for ids in (*seen[:2], *seen[3:]) for k in ids) == list(range(15))
    monkeypatch.undo()
    assert torch.equal(found.values, influence.features(TRAIN))


@pytest.mark.parametrize("batch_positions", [None, 3])
def test_some_examples_stand_in_their_order_and_are_not_taken_for_others(
    tmp_path: Path, batch_positions: int | None
) -> None:
    influence = InfluenceFunction(mlp(), EKFAC(), batch_size=2, progress=False).fit(TRAIN)
    whole = influence.features(TRAIN)
    for number, ids in enumerate(([12, 14, 13, 7], [0, 1, 2, 3])):
        part = ExampleLoader(TRAIN, indices=ids)
        settings: dict[str, Any] = {"dtype": torch.float64, "batch_positions": batch_positions}
        found = influence.write_features(part, tmp_path / f"{number}.npy", **settings)
        torch.testing.assert_close(found.values, whole[ids])
        with pytest.raises(StoreError, match=r"ids: stored .*, asked"):
            influence.write_features(ExampleLoader(TRAIN, indices=[5, 6, 8, 9]), found.path, **settings)


def test_features_of_another_curvature_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    influence = InfluenceFunction(mlp(), EKFAC(), progress=False).fit(TRAIN)
    influence.write_features(TRAIN, path)
    for other in (EKFAC(damping_share=0.2), EKFAC(seed=1), Identity()):
        with pytest.raises(StoreError, match="curvature: stored"):
            InfluenceFunction(mlp(), other, progress=False).fit(TRAIN).write_features(TRAIN, path)
    elsewhere = EKFAC().fit(mlp(), points(15, seed=9), progress=False)
    with pytest.raises(StoreError, match="curvature: stored"):
        InfluenceFunction(mlp(), elsewhere, progress=False).write_features(TRAIN, path)
    with pytest.raises(StoreError, match="vectors: stored"):
        InfluenceFunction(mlp(), influence.curvature, normalise=True).write_features(TRAIN, path)
    assert torch.equal(
        GradientMatrix.open(path).values, influence.write_features(TRAIN, path).values
    )  # as it was all the time


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    with pytest.raises(NotFittedError, match=r"`InfluenceFunction.write_features`: EKFAC is not fitted"):
        InfluenceFunction(mlp()).write_features(TRAIN, path)
    with pytest.raises(ValueError, match=r"`CG.whiten`: a curvature that is known by its products alone"):
        InfluenceFunction(mlp(), CG()).fit(TRAIN).write_features(TRAIN, path)
    with pytest.raises(ValueError, match=r"dtype=torch.int8"):
        InfluenceFunction(mlp(), Identity()).write_features(TRAIN, path, dtype=torch.int8)
    far = [(torch.ones(2), torch.tensor([1e7 if k == 3 else 1.0])) for k in range(5)]
    with pytest.raises(ValueError, match=r"1 examples do not fit into torch.float16 \(ids \[3\]"):
        InfluenceFunction(nn.Linear(2, 1), Identity(), progress=False).write_features(far, path)
    assert not list(tmp_path.iterdir())


def test_the_name_of_a_curvature_depends_on_all_of_it() -> None:
    state = EKFAC().fit(mlp(), TRAIN, progress=False).state()
    first = tensors_fingerprint(state, {"a": 1})
    assert first == tensors_fingerprint(dict(reversed(state.items())), {"a": 1})
    assert first != tensors_fingerprint(state, {"a": 2})
    name = next(iter(state))
    assert first != tensors_fingerprint({**state, name: state[name] + 1}, {"a": 1})
