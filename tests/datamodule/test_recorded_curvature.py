"""Only the factors of this model and these components."""

from __future__ import annotations

import pytest
import torch

from lightning_influence.curvature import KFAC
from lightning_influence.datamodule.recorded_curvature import recorded_curvature
from lightning_influence.errors import StoreError
from lightning_influence.estimators import InfluenceFunction
from lightning_influence.store import Store
from tests.datamodule.toys import Net, numbered


def test_read_back_or_refused(tmp_path):
    model = Net()
    fitted = InfluenceFunction(model, KFAC(damping=0.5), progress=False).fit(numbered())
    store = Store.create(tmp_path / "factors", model, fitted.components)
    store.write_curvature("curvature", fitted.curvature)
    for select in (None, "net"):
        found = InfluenceFunction(model, recorded_curvature(tmp_path / "factors", model, select), progress=False)
        torch.testing.assert_close(
            found.score(numbered(3), numbered()).values, fitted.score(numbered(3), numbered()).values
        )
    with pytest.raises(StoreError, match="does not fit"):
        recorded_curvature(tmp_path / "factors", Net(), None)
