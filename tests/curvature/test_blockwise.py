from __future__ import annotations

import pytest
import torch

from lightning_influence.capture import find_components
from lightning_influence.curvature import EKFAC, KFAC
from lightning_influence.errors import StoreError
from tests.curvature.models import Mixed, mlp, normal, points, ready, token_rows


def test_every_component_has_a_damping_of_its_own() -> None:
    """A share of its own mean eigenvalue: scaling the gradients of one layer does not touch the other."""
    model = mlp()
    curvature = EKFAC(damping_share=0.5).fit(model, points())
    for component in curvature.components:
        block = curvature.blocks[component.name]
        gradients = normal(2, *component.shape)
        expected = block.solve(gradients, 0.5 * float(block.eigenvalues().mean()))
        torch.testing.assert_close(curvature.solve(component, gradients), expected)


def test_absolute_damping_is_the_same_for_all() -> None:
    curvature = KFAC(damping=0.25).fit(mlp(), points())
    for component in curvature.components:
        gradients = normal(2, *component.shape)
        expected = curvature.blocks[component.name].solve(gradients, 0.25)
        assert torch.equal(curvature.solve(component, gradients), expected)


def test_a_component_without_any_gradient_is_left_alone() -> None:
    """Its loss never depends on it, so there is no curvature to divide by."""
    data = [(x * torch.tensor([1.0, 1.0, 0.0]).double(), y) for x, y in points()]
    model = mlp()
    with torch.no_grad():
        model[2].weight.zero_()  # nothing flows back to the first layer
    curvature = EKFAC(fisher="empirical").fit(model, data)
    component = curvature.components[0]
    gradients = normal(2, *component.shape)
    torch.testing.assert_close(curvature.solve(component, gradients), gradients)


def test_sums_are_named_by_component() -> None:
    curvature = EKFAC()
    assert curvature.partial() == {}
    curvature.fit(ready(Mixed()), token_rows())
    assert curvature.partial() == {}
    assert {key.split("/")[0] for key in curvature.state()} == {c.name for c in find_components(ready(Mixed()))}


def test_a_state_must_cover_all_components() -> None:
    curvature = EKFAC().fit(mlp(), points())
    state = curvature.state()
    part = {key: value for key, value in state.items() if not key.startswith("2/")}
    for components, tensors in ((curvature.components, part), (curvature.components[:1], state)):
        with pytest.raises(StoreError, match=r"EKFAC.load_state: only one of components and factors has \['2'\]"):
            EKFAC().load_state(components, tensors)


def test_values_too_large_to_be_squared_are_told_in_words() -> None:
    data = points(4)
    data[2] = (torch.tensor([1e200, 0.0, 0.0]).double(), data[2][1])
    with pytest.raises(ValueError, match=r"EKFAC.finish_pass\(\)`: the sums of \['0'\] are not finite"):
        EKFAC(fisher="empirical").fit(mlp(), data)
