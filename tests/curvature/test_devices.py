"""A fitted curvature goes where its model goes. On a real accelerator: tests/test_accelerator.py."""

from __future__ import annotations

import pytest
import torch

from tests.curvature.models import Mixed, ready
from tests.curvature.test_base import FITTED, fitted

MOVED = [name for name in FITTED if name != "Arnoldi"]  # whose mean eigenvalue is a number


@pytest.mark.parametrize("name", MOVED)
def test_moves_with_all_that_was_fitted(name: str) -> None:
    curvature = fitted(name)
    before = {key: value.clone() for key, value in curvature.state().items()}
    assert curvature.to("cpu").state().keys() == before.keys()
    changed = ready(Mixed())
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    moved = curvature.to("meta")
    assert {key: tuple(value.shape) for key, value in moved.state().items() if value.is_meta} == {
        key: tuple(value.shape) for key, value in before.items()
    }
    assert moved.changed(changed)
    assert not moved.changed(ready(Mixed()))
