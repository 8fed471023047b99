"""A random part of the pool at first."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_influence.callbacks import CurvatureRecorder
from lightning_influence.curvature import KFAC
from lightning_influence.datamodule import DataSelector
from lightning_influence.datamodule.warm_up import WarmUp
from lightning_influence.estimators import InfluenceFunction
from tests.datamodule.test_data_selector import NO_VALIDATION, rows, saver, select
from tests.datamodule.toys import Data, Net, fit, numbered


def test_the_part_first_and_the_selection_afterwards():
    data = Data(n=48)
    selector = DataSelector(data, budget=3, warmup=0.25)
    assert selector.warmup_ids is None
    model = fit(selector, max_epochs=2)
    assert len(selector.warmup_ids) == 10
    assert sorted(model.seen) == sorted(2 * rows(data, selector.warmup_ids))
    chosen = select(selector, model)
    assert len(selector.pool_dataloader().dataset) == 40  # chosen among all
    assert sorted(fit(selector).seen) == rows(data, list(chosen.ids))
    selector.clear()
    assert sorted(fit(selector).seen) == rows(data, selector.warmup_ids)


@NO_VALIDATION
def test_training_is_that_on_the_same_rows():
    """Drawing takes no random number of the fit's."""
    found, part = [], None
    for _ in range(2):
        seed_everything(2, verbose=False)
        selector = DataSelector(numbered(), selection=part, warmup=None if part else 6, seed=4)
        model = fit(selector, max_epochs=3)
        part = selector.warmup_ids
        found.append((model.seen, model.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], value) for name, value in found[1][1].items())


def test_draws_are_seeded_and_uniform():
    data = numbered(20)
    assert WarmUp(0.25, 1).of(data).ids == WarmUp(5, 1).of(data).ids != WarmUp(5, 2).of(data).ids
    counts = torch.zeros(20)
    for seed in range(400):
        counts[WarmUp(5, seed).of(data).ids] += 1
    assert (counts - 100).abs().max() < 5 * (400 * 0.25 * 0.75) ** 0.5


@NO_VALIDATION
def test_recorders_see_the_whole_pool(tmp_path):
    recorder, model = CurvatureRecorder(KFAC(fisher="empirical"), dirpath=str(tmp_path), when="fit_end"), Net()
    fit(DataSelector(numbered(), warmup=4), model, callbacks=[recorder])
    recorded = InfluenceFunction.from_store(model, recorder.records[0].path, progress=False)
    whole = InfluenceFunction(model, KFAC(fisher="empirical"), progress=False).fit(numbered())
    scores = [influence.score(numbered(3, seed=1), numbered()).values for influence in (recorded, whole)]
    torch.testing.assert_close(*scores)
    part = InfluenceFunction(model, KFAC(fisher="empirical"), progress=False).fit(numbered(12))
    assert not torch.allclose(scores[0], part.score(numbered(3, seed=1), numbered()).values)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_warm_up_goes_on_with_its_rows(tmp_path):
    fit(DataSelector(Data(), warmup=5), **saver(tmp_path))
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["DataSelector"]
    assert json.loads(json.dumps(state)) == state
    again = DataSelector(Data(), warmup=5)
    model = fit(again, ckpt_path=str(tmp_path / "end.ckpt"), max_epochs=2)
    assert again.warmup_ids == sorted(state["warmup"]["positions"])
    assert sorted(model.seen) == rows(again._inner, again.warmup_ids)
    other = DataSelector(Data(), warmup=7, seed=1)
    other.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"warmup=7, seed=1\): the checkpoint was trained on other rows, 5 in number"):
        fit(other)
    assert other.warmup_ids == again.warmup_ids
    whole = DataSelector(Data())
    whole.load_state_dict(state)
    assert len(fit(whole).seen) == 16


@pytest.mark.parametrize("part", [0, -2, 1.5, True, "some"])
def test_what_is_no_part(part):
    with pytest.raises(ValueError, match=r"`DataSelector\(warmup=.*\)`: expected an int >= 1 or a fraction"):
        DataSelector(Data(), warmup=part)


def test_a_part_larger_than_the_pool():
    with pytest.raises(ValueError, match=r"`DataSelector\(warmup=25\)`: .*The pool has 24 rows"):
        DataSelector(numbered(), warmup=25)
    with pytest.raises(ValueError, match=r"`Random\(seed=-1\)`"):
        DataSelector(numbered(), warmup=2, seed=-1)


def test_another_split_is_noticed():
    selector = DataSelector(Data(seeded=False), warmup=3)
    fit(selector)
    with pytest.raises(ValueError, match="seed `random_split`"):
        fit(selector)
