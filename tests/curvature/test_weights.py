from __future__ import annotations

import pytest
import torch

from lightning_influence import EKFAC, ExampleLoader, GradientCapture, Identity, find_components
from lightning_influence.curvature.weights import changed, weights_of
from tests.curvature.models import Mixed, mlp, points, ready


def test_what_has_changed_is_named() -> None:
    model = ready(Mixed())
    components = find_components(model)
    before = weights_of(model, components)
    assert changed(before, weights_of(ready(Mixed()), components)) == []
    with torch.no_grad():
        model.up.weight[0, 0] += 1e-6
        model.norm.bias.neg_()  # of the same length
    assert changed(before, weights_of(model, components)) == ["norm.bias", "up.weight"]
    assert changed(before, {}) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_weights_in_another_precision(dtype: torch.dtype) -> None:
    components = find_components(mlp())
    before = weights_of(mlp(), components)
    assert changed(before, weights_of(mlp().to(dtype), components)) == []
    assert changed(before, weights_of(torch.nn.Sequential(*[m.to(dtype) for m in mlp()]).apply(halve), components))


def halve(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter *= 0.5


def test_a_curvature_knows_what_it_was_fitted_on() -> None:
    model = mlp()
    curvature = EKFAC().fit(model, points())
    assert curvature.changed(model) == []
    assert curvature.changed(mlp().apply(halve)) == ["0.bias", "0.weight", "2.weight"]
    halve(model[0])
    assert curvature.changed(model) == ["0.bias", "0.weight"]
    assert curvature.fit(model, points()).changed(model) == []


def test_where_that_is_not_known_nothing_is_said() -> None:
    model, curvature = mlp(), EKFAC()
    with GradientCapture(model) as capture:
        curvature.start(capture.components)
        for _ in range(2):
            for ids, batch in ExampleLoader(points()):
                curvature.observe(capture, ids, batch)
            curvature.finish_pass()
    read = EKFAC()
    read.load_state(curvature.components, curvature.state())
    for one in (curvature, read, Identity(), Identity().fit(model, points())):
        assert one.changed(mlp().apply(halve)) == []
