"""Where the targets come from."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from lightning_influence.datamodule.target_data import checked_targets, target_data
from tests.datamodule.toys import Data, TrainOnly, numbered


def test_given_targets_go_before_validation_data():
    inner = Data()
    inner.setup("fit")
    pool, loader = DataLoader(numbered(), batch_size=5), DataLoader(numbered(6), batch_size=2)
    assert target_data(loader, pool, inner) is loader
    assert target_data(numbered(7), pool, inner).batch_size == 5
    named = target_data({"a": loader, "b": numbered(7)}, pool, inner)
    assert (named["a"], named["b"].batch_size) == (loader, 5)
    assert target_data(None, pool, inner).dataset is inner.val


def test_no_targets_at_all():
    with pytest.raises(ValueError, match="no single validation loader to take the targets from"):
        target_data(None, DataLoader(numbered()), TrainOnly(DataLoader(numbered())))
    with pytest.raises(ValueError, match=r"`DataSelector\(targets=list\)`: .*expected at least one example"):
        checked_targets([])
