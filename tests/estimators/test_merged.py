from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from lightning_influence.estimators.merged import adapted, merged


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 4)
        self.down = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).tanh())


class Wrapper(nn.Module):
    """As a LightningModule holds the model that peft made."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def lora() -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(Network(), peft.LoraConfig(r=2, target_modules=["up"], lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_copy_computes_the_same_without_adapters(wrapped: bool) -> None:
    model = Wrapper(lora()) if wrapped else lora()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = merged(model)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found(x), model(x))
    prefix = "net." if wrapped else ""
    assert [name for name, p in found.named_parameters() if p.requires_grad] == [
        f"{prefix}{name}" for name, _ in Network().named_parameters()
    ]
    assert adapted(model)
    assert not adapted(found)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad == ("lora_" in name)


def test_nothing_to_merge() -> None:
    with pytest.raises(
        ValueError, match=r"`merged\(Network\)`: expected a model with LoRA adapters of peft, found none"
    ):
        merged(Network())
    with pytest.raises(ValueError, match="its adapters are not held by a PeftModel"):
        merged(lora().base_model.model)
