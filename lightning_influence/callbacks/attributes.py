"""What a user's ``training_step`` notes for itself, put back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

REGISTRIES = frozenset(vars(nn.Module()))  # parameters, buffers, hooks, mode: not the user's
LARGE = 1000  # items of a container that is not searched for containers: a dataset or a vocabulary
DEPTH = 3  # of containers in each other, which may be cyclic


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back attributes of all submodules, and the items of lists, sets, dictionaries and deques in them.

    Containers within containers of at most 1000 items are put back too.

    ``self.outputs.append(loss)`` would otherwise enter the user's epoch mean, and keep the graph of every batch. Not
    put back are changes within tensors and other objects.

    >>> model = nn.Linear(1, 1)
    >>> model.outputs = [1.0]
    >>> with attributes_kept(model):
    ...     model.outputs.append(2.0)
    >>> model.outputs
    [1.0]
    """
    before = [(vars(module), _own(module)) for module in model.modules()]
    contents = _restorers(value for _, own in before for value in own.values())
    try:
        yield
    finally:
        for attributes, own in before:
            for name in attributes.keys() - own.keys() - REGISTRIES:
                del attributes[name]
            attributes.update(own)
        for restore in contents:
            restore()


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in REGISTRIES}


def _restorers(values: Iterable[Any], depth: int = DEPTH) -> list[Callable[[], None]]:
    return [_restorer(value, depth) for value in values if isinstance(value, list | dict | set | deque)]


def _restorer(container: Any, depth: int) -> Callable[[], None]:
    """What puts the items of a container back, also those of containers in it."""
    items: Any = dict(container) if isinstance(container, dict) else list(container)
    inside = items.values() if isinstance(items, dict) else items
    deeper = _restorers(inside, depth - 1) if depth > 1 and len(items) <= LARGE else []

    def restore() -> None:
        if _differ(container, items):
            container.clear()
            (container.update if isinstance(container, dict | set) else container.extend)(items)
        for restore_item in deeper:
            restore_item()

    return restore


def _differ(now: Any, before: Any) -> bool:
    """Whether a container holds other items than before, by identity: items may be tensors."""
    if isinstance(now, dict):
        return _differ([*now.keys(), *now.values()], [*before.keys(), *before.values()])
    return len(now) != len(before) or any(one is not other for one, other in zip(now, before, strict=True))
