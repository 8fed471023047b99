from __future__ import annotations

import torch

from lightning_influence.curvature import Identity
from tests.curvature.models import mlp, normal, points


def test_it_returns_its_argument() -> None:
    identity = Identity()
    gradients = {"0": normal(2, 3, 4), "anything": normal(2, 5)}
    found = identity.precondition(gradients)
    assert found.keys() == gradients.keys()
    assert all(found[name] is gradients[name] for name in gradients)
    assert identity.fitted
    assert identity.settings() == {}
    assert identity.state() == {}


def test_it_takes_no_pass_over_the_data() -> None:
    rows = points()

    class Counted(list):
        reads = 0

        def __getitem__(self, position: int) -> object:
            Counted.reads += 1
            return rows[position]

    identity = Identity().fit(mlp(), Counted(rows), batch_size=2)
    assert Counted.reads <= 2  # the first batch, to resolve the loss
    assert [c.name for c in identity.components] == ["0", "2"]
    [component, _] = identity.components
    gradients = normal(2, *component.shape)
    assert torch.equal(identity.solve(component, gradients), gradients)
