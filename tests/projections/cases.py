"""Components of every shape and records of their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.capture import Component
from lightning_influence.capture.component import Use
from lightning_influence.capture.record import DenseRecord, FactoredRecord, IndexedRecord, LayerRecord, SumRecord

# Name: shape of the component and kind of its records.
SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "tall": ((40, 3), "factored"),
    "wide": ((3, 40), "factored"),
    "square": ((12, 12), "factored"),
    "one row": ((1, 30), "factored"),
    "one column": ((30, 1), "factored"),
    "vector": ((30,), "dense"),
    "convolution": ((4, 3, 3), "dense"),
    "table": ((50, 4), "indexed"),
    "tied": ((50, 4), "tied"),
}


def component(name: str, shape: tuple[int, ...]) -> Component:
    return Component(name, "linear", (Use(name, ("weight",)),), (f"{name}.weight",), shape)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def record(shape: tuple[int, ...], kind: str, n: int = 3, t: int = 5, seed: int = 0) -> LayerRecord:
    """Gradients that have something in common, so that their inner products are not all noise."""
    ids = torch.arange(n)
    if kind == "dense":
        return DenseRecord(ids, normal(n, *shape, seed=seed) + normal(1, *shape, seed=seed + 1))
    o, i = shape
    gradients = normal(n, t, o if kind == "factored" else i, seed=seed) + 1
    if kind == "factored":
        return FactoredRecord(ids, normal(n, t, i, seed=seed + 1) + 1, gradients)
    indices = torch.randint(o, (n, t), generator=torch.Generator().manual_seed(seed + 2))
    indices[:, 0] = 1
    looked_up = IndexedRecord(ids, indices, gradients, o)
    return looked_up if kind == "indexed" else SumRecord(ids, (looked_up, record(shape, "factored", n, t, seed + 7)))


def flat(found: LayerRecord) -> Tensor:
    """Materialised, [n, numel]."""
    return found.example_gradients().flatten(1)


def dense(found: LayerRecord) -> DenseRecord:
    return DenseRecord(found.ids, found.example_gradients())
