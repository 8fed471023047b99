"""What each training example does to its own loss, from gradients that are materialised a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_influence.capture.contexts import full_precision
from lightning_influence.capture.record import LayerRecord

SELF = "itself"

Transform = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@full_precision()
def self_products(records: Mapping[str, LayerRecord], transform: Transform, memory: int) -> Tensor:
    """``<T g_i, g_i>`` of each example for each component, [c, n].

    The transform acts on whole gradients, of all components together as some curvatures couple them; those of as many
    examples are formed at a time as fit into memory, of one at least.

    Args:
        records: Of one batch, by component.
        transform: T, linear: gradients [m, *shape] by component -> the same shapes.
        memory: Bytes for the gradients that are formed at a time, before T.
    """
    n = len(next(iter(records.values())))
    size = 8 * sum(record.example_numel for record in records.values())  # float64; float32 takes half of it
    step = max(1, memory // size)
    parts = ({name: r.narrow(m, min(m + step, n)) for name, r in records.items()} for m in range(0, n, step))
    return torch.cat([_products(part, transform) for part in parts], dim=1)


def _products(records: Mapping[str, LayerRecord], transform: Transform) -> Tensor:
    gradients = {name: record.example_gradients() for name, record in records.items()}
    moved = transform(gradients)
    return torch.stack([(moved[name].flatten(1) * g.flatten(1)).sum(1) for name, g in gradients.items()])
