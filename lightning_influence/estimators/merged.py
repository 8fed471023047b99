"""Adapters folded into the weights that they adapt."""

from __future__ import annotations

import copy

from torch import nn


def adapted(model: nn.Module) -> list[str]:
    """Names of the modules of a model that carry LoRA adapters of the package peft."""
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


def merged(model: nn.Module) -> nn.Module:
    """A copy of a model with its LoRA adapters (peft) added to the weights, all of it trainable.

    The pre-trained model has no adapters, so its gradients can only be compared with those of the weights that the
    adapters change. The copy takes as much memory as the model; its names are those of the model before peft
    wrapped it.

    Raises:
        ValueError: If there is nothing to merge.
    """
    if not adapted(model):
        raise ValueError(f"`merged({type(model).__name__})`: expected a model with LoRA adapters of peft, found none.")
    twin = copy.deepcopy(model)
    wrapped = [name for name, module in twin.named_modules() if callable(getattr(module, "merge_and_unload", None))]
    outer = [name for name in wrapped if not any(_within(name, other) for other in wrapped)]
    if not outer:
        raise ValueError(
            f"`merged({type(model).__name__})`: its adapters are not held by a PeftModel; expected a model that has "
            "merge_and_unload(), or holds one that has."
        )
    for name in outer:
        plain = twin.get_submodule(name).merge_and_unload()  # type: ignore[operator]
        if not name:
            twin = plain
            break
        parent, _, own = name.rpartition(".")
        setattr(twin.get_submodule(parent), own, plain)
    return twin.requires_grad_(True)


def _within(name: str, other: str) -> bool:
    return name != other and (not other or name.startswith(f"{other}."))
