"""Which modules of a model run."""

from __future__ import annotations

from torch import nn


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called: containers such as nn.ParameterList and a bare LightningModule cannot.

    >>> has_forward(nn.Linear(2, 1)), has_forward(nn.ModuleList())
    (True, False)
    """
    if "forward" in vars(module):
        return True
    owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
    # LightningModule defines a forward only to say that there is none.
    return owner is not nn.Module and owner.__name__ != "LightningModule"


def runner(model: nn.Module, name: str) -> str:
    """Name of the nearest module at or above ``name`` that can be called; its calls use the parameters there.

    >>> model = nn.Sequential(nn.ModuleList([nn.ParameterList()]))
    >>> runner(model, "0.0")
    ''
    """
    while name and not has_forward(model.get_submodule(name)):
        name = name.rpartition(".")[0]
    return name


def runnable(model: nn.Module) -> nn.Module:
    """The module to call: the model, or what it wraps when it has no forward of its own.

    Raises:
        ValueError: If it has no forward and not exactly one child with parameters that has one.
    """
    if has_forward(model):
        return model
    children = [
        (name, child)
        for name, child in model.named_children()
        if has_forward(child) and next(child.parameters(), None) is not None
    ]
    if len(children) != 1:
        found = [name for name, _ in children] or "none"
        raise ValueError(
            f"{type(model).__name__} has no forward(), and its children with parameters that could be called instead "
            f"are {found}; expected exactly one. Define forward(), or example_losses(batch) -> [n]."
        )
    return children[0][1]
