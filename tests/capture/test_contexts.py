from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_influence.capture.contexts import eager, evaluating, full_precision


def test_modes_come_back_module_by_module() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model.train()
    model[1].training = False
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_compiled_modules_run_as_they_are_written() -> None:
    seen = []
    model = nn.Linear(2, 2)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.ones(1, 2))
    model.register_forward_hook(lambda *args: seen.append(1))
    with eager():
        compiled(torch.ones(1, 2))
    assert seen == [1]


def test_the_compiler_is_not_imported_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds; where it has not been imported, nothing is compiled."""
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    with eager():
        assert "torch._dynamo" not in sys.modules


def test_products_are_exact_under_autocast() -> None:
    left = torch.full((2, 2), 1.0 + 2.0**-12)

    @full_precision()
    def product() -> torch.Tensor:
        return left @ left

    with torch.autocast("cpu", torch.bfloat16):
        assert (left @ left).dtype == torch.bfloat16
        assert torch.equal(product(), product().float())
        with full_precision():
            assert (left @ left).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(product(), left @ left)
