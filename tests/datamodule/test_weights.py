"""Selected rows that come more often than others."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler

from lightning_influence.datamodule import DataSelector
from lightning_influence.selection import TopK
from tests.datamodule.test_data_selector import NO_VALIDATION, rows, select
from tests.datamodule.toys import Data, TrainOnly, fit, numbered


@NO_VALIDATION
def test_weighed_rows_are_trained_on_as_with_torchs_own_sampler(tmp_path):
    pool, picked, weights = numbered(), [3, 9, 14], [1.0, 0.0, 5.0]
    selector = DataSelector(DataLoader(pool, batch_size=2, shuffle=True), selection=picked)
    selector.weigh(dict(zip(picked, weights, strict=True)))
    later = DataSelector(
        DataLoader(pool, batch_size=2, shuffle=True), selection=str(selector.save(tmp_path / "rows.json"))
    )
    sampler = WeightedRandomSampler(weights, 3)
    own = TrainOnly(DataLoader(Subset(pool, picked), batch_size=2, sampler=sampler))
    found = []
    for data in (own, selector, later):
        seed_everything(6, verbose=False)
        model = fit(data, max_epochs=8)
        assert set(model.seen) == {3, 14}
        found.append((model.seen, model.net.weight))
    assert found[0][0] == found[1][0] == found[2][0]
    assert torch.equal(found[0][1], found[1][1])


def test_weights_from_the_gains_of_every_selection():
    selector = DataSelector(Data(), budget=4, rule=TopK(), weights="gains")
    with pytest.raises(ValueError, match="nothing has been selected; call select first"):
        selector.weigh("gains")
    found = select(selector)
    assert selector._chosen.weights == tuple(found.gains.neg().clamp(min=0).tolist())
    assert selector.state_dict()["selection"]["weights"] == list(selector._chosen.weights)
    selector.weigh(None)
    assert sorted(fit(selector).seen) == rows(selector._inner, list(found.ids))
    selector.weigh("gains")
    selector._loader_fn = lambda part: DataLoader(part)
    with pytest.raises(ValueError, match="makes the loader itself: leave it or the weights out"):
        fit(selector)
