"""Selection on an accelerator: a pool in runs, from a file, from a model that is there, and rows that do not fit.

Runs where there is a GPU: pytest tests/test_accelerator_selection.py. LI_TEST_DEVICE as in `test_accelerator`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import (
    EKFAC,
    DataSelector,
    GradientDot,
    InfluenceFunction,
    InteractionGreedy,
    Interactions,
    NewtonGreedy,
    NewtonPool,
    certify,
    refine,
    select_training_data,
)
from lightning_influence.capture.unfit import UnfitExamplesError
from lightning_influence.selection import newton_greedy, selection_device
from tests import test_accelerator as shared

CPU, DEVICE, POOL, TARGETS = shared.CPU, shared.DEVICE, shared.POOL, shared.TARGETS
pytestmark = shared.pytestmark


def clustered(n: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of unit length [n, r] in ten clusters, and 16 targets of one of them."""
    generator = torch.Generator().manual_seed(7)
    deviations, centres = torch.arange(1, r + 1).rsqrt(), torch.randn(10, r, generator=generator)
    near = torch.cat([torch.randint(10, (n,), generator=generator), torch.zeros(16, dtype=torch.long)])
    rows = (torch.randn(n + 16, r, generator=generator) + centres[near]) * deviations
    rows = (rows / rows.norm(dim=1, keepdim=True)).to(dtype)
    return rows[:n], rows[n:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("longest", [1, newton_greedy.LONGEST])
def test_newton_picks_in_runs(dtype, longest, monkeypatch):
    rows, goals = clustered(3000, 40, dtype)
    expected = NewtonPool(rows, goals).select(120, NewtonGreedy(0.1))
    monkeypatch.setattr(newton_greedy, "LONGEST", longest)
    pool = NewtonPool(rows, goals).to(DEVICE)
    assert pool.features.device.type == DEVICE.type
    found = pool.select(120, NewtonGreedy(0.1))
    assert found.ids == expected.ids
    torch.testing.assert_close(found.gains.cpu(), expected.gains.cpu(), rtol=1e-6, atol=1e-9)


def test_unseen_parts_and_the_ridge_that_is_found():
    rows, goals = clustered(2000, 30, torch.float64)
    unseen = torch.rand(2000, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    pool = NewtonPool(rows, goals, unseen=unseen)
    assert pool.to(DEVICE).select(60).ids == pool.select(60).ids
    torch.testing.assert_close(pool.to(DEVICE).ridge(60).errors, pool.ridge(60).errors, rtol=1e-6, atol=1e-9)


def test_features_from_a_file_of_the_device(tmp_path):
    picks = []
    for device in (CPU, DEVICE):
        model = shared.classifier(device)
        curvature = EKFAC().fit(shared.classifier(CPU), POOL, progress=False)
        influence = InfluenceFunction(model, curvature, normalise=True, progress=False)
        path = tmp_path / f"{len(picks)}.npy"
        pool = NewtonPool.whitened(influence, TARGETS, POOL, path=path)
        assert pool.features.dtype == torch.float16
        assert torch.equal(pool.features.cpu(), influence.write_features(POOL, path).values.cpu())
        picks += [pool.select(6).ids, pool.to(DEVICE).select(6).ids]
    assert picks[0] == picks[1] == picks[2] == picks[3]


@pytest.mark.parametrize("least", [1, 2**60])
def test_a_selection_is_the_same_wherever_the_rule_looks(least, monkeypatch):
    monkeypatch.setattr(selection_device, "LEAST", least)
    seen: list[str] = []

    def select(self: NewtonGreedy, values: Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(values.device.type)
        return original(self, values, *arguments, **options)

    original = NewtonGreedy.select
    monkeypatch.setattr(NewtonGreedy, "select", select)
    options: dict[str, Any] = {"budget": 8, "rule": NewtonGreedy(0.3)}
    expected = select_training_data(shared.classifier(CPU), POOL, TARGETS, progress=False, **options)
    model = shared.classifier(DEVICE)
    found = select_training_data(model, POOL, TARGETS, progress=False, **options)
    wrapped = DataSelector(DataLoader(POOL, batch_size=4), TARGETS, **options).select(model, progress=False)
    assert found.ids == wrapped.ids == expected.ids
    there = "cuda" if DEVICE.type == "cuda" and least == 1 else "cpu"
    assert seen == ["cpu", there, there]
    assert next(model.parameters()).device.type == DEVICE.type


def test_a_certified_and_refined_choice():
    rows, goals = clustered(800, 24, torch.float64)
    found = []
    for device in (CPU, DEVICE):
        known = Interactions.from_features(rows.to(device), goals.to(device)).reweighted(0.02)
        parts = known.values, known.features, known.metric
        first = InteractionGreedy().select(*parts, budget=30)
        better = refine(first, *parts)
        found.append((first.ids, better.ids, certify(better, *parts).optimality_gap))
    assert found[0][:2] == found[1][:2]
    assert found[1][2] == pytest.approx(found[0][2], rel=1e-3, abs=1e-6)


def test_a_label_outside_the_head_is_named_and_leaves_the_device_usable():
    inputs, labels = POOL.tensors
    wrong = TensorDataset(inputs, labels.clone().index_fill_(0, torch.tensor([17]), 5))
    model = shared.classifier(DEVICE)
    for call in (
        lambda: GradientDot(model, progress=False).score(TARGETS, wrong),
        lambda: EKFAC().fit(model, wrong, progress=False),
        lambda: select_training_data(model, wrong, TARGETS, budget=4, progress=False),
    ):
        with pytest.raises(UnfitExamplesError, match="expected labels 0 to 2") as caught:
            call()
        assert caught.value.ids == (17,)
    scores = shared.total(GradientDot(model, progress=False).score(TARGETS, POOL))  # a failed kernel would stop this
    assert bool(scores.isfinite().all())


def test_a_token_outside_the_vocabulary_is_named_and_leaves_the_device_usable():
    model, sentences = shared.language_model(DEVICE), shared.Sentences(12, 0)
    for key in ("input_ids", "labels"):
        rows = [dict(sentences[k]) for k in range(12)]
        rows[7] = {**rows[7], key: rows[7][key].clone().index_fill_(0, torch.tensor([7]), 50)}
        with pytest.raises(UnfitExamplesError, match=r"got (token|label) 50; expected") as caught:
            GradientDot(model, progress=False).score(sentences, rows)
        assert caught.value.ids == (7,)
    assert bool(shared.total(GradientDot(model, progress=False).score(sentences, sentences)).isfinite().all())
