"""Inner products of many pairs of examples, component by component, from their gradients in compact form."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.capture.contexts import full_precision
from lightning_influence.capture.layers.base import REMEMBERED, widened
from lightning_influence.capture.record import DenseRecord, FactoredRecord, IndexedRecord, LayerRecord, SumRecord
from lightning_influence.estimators.compact import Kept
from lightning_influence.estimators.threads import shares, side_by_side

TOGETHER = 64  # pairs that are compared component by component; what they have in common is kept for a while
RAYS = (
    8  # examples that are laid end to end: enough for a product to run at full speed, and for every thread to have some
)

Key = tuple[int, ...]


@full_precision()
def products(pairs: Sequence[tuple[Kept, Kept]]) -> Tensor:
    """``<g, g'>`` of pairs of examples for each component, [p, c].

    Factors: ``Σ_t,t' (a_t · a'_t')(s_t · s'_t')``; the first of the two is computed once for components that multiply
    the same input ([SP] A.2). Half precision is widened before anything is multiplied or summed.

    Examples that are compared with the same one are laid end to end, as few large matrix products run faster than
    many small ones; and all pairs take their turn at one component before the next, so that an example's part of it is
    read from memory once. On the processor every thread has pairs of its own.
    """
    parts = (pairs[k : k + TOGETHER] for k in range(0, len(pairs), TOGETHER))
    return torch.cat([_products(part) for part in parts])


@dataclass(frozen=True)
class _Star:
    """One example, others to compare it with, and the places of these pairs."""

    centre: Kept
    others: list[Kept]
    places: list[int]

    @property
    def work(self) -> float:
        """About proportional to its time."""
        return sum(self.centre.bytes * other.bytes for other in self.others)


def _stars(pairs: Sequence[tuple[Kept, Kept]]) -> list[_Star]:
    """The pairs by the one of the two that stands in more of them, a few at a time."""
    times = Counter(id(kept) for pair in pairs for kept in pair)
    stars: list[_Star] = []
    growing: dict[int, _Star] = {}
    for place, pair in enumerate(pairs):
        centre, other = sorted(pair, key=lambda kept: -times[id(kept)])
        star = growing.get(id(centre))
        if star is None or len(star.others) == RAYS:
            star = growing[id(centre)] = _Star(centre, [], [])
            stars.append(star)
        star.others.append(other)
        star.places.append(place)
    return stars


def _products(pairs: Sequence[tuple[Kept, Kept]]) -> Tensor:
    stars = _stars(pairs)
    if pairs[0][0].device.type == "cpu":
        work = [star.work for star in stars]
        parts = [[stars[k] for k in share] for share in shares(work, torch.get_num_threads())]
        values = torch.cat(side_by_side(_columns, parts))
    else:
        parts = [stars]
        values = _columns(stars)
    order = torch.tensor([place for part in parts for star in part for place in star.places])
    return torch.empty_like(values).index_copy_(0, order.to(values.device), values)


def _columns(stars: Sequence[_Star]) -> Tensor:
    """Products of all pairs of some stars, one star after the other, [p, c]."""
    inputs, columns = _Remembered(), []
    for k in range(len(stars[0].centre.records)):
        inputs.next_component()
        parts = [_rays(star.centre.records[k], [other.records[k] for other in star.others], inputs) for star in stars]
        columns.append(torch.cat(parts))
    return torch.stack(columns, dim=1)


def _rays(centre: LayerRecord, others: Sequence[LayerRecord], inputs: _Remembered) -> Tensor:
    """Products of one example with others, [m]."""
    factored = [other for other in others if isinstance(other, FactoredRecord)]
    if isinstance(centre, FactoredRecord) and len(factored) == len(others):
        return _factored_rays(centre, factored, inputs)
    wide = _wide(centre)
    return torch.stack([_product(wide, _wide(other)) for other in others])


def _factored_rays(centre: FactoredRecord, others: Sequence[FactoredRecord], inputs: _Remembered) -> Tensor:
    keys = (id(centre.inputs), *(id(other.inputs) for other in others))
    inner = inputs.once(keys, lambda: widened(centre.inputs[0]) @ _end_to_end([o.inputs[0] for o in others]).mT)
    outer = widened(centre.gradients[0]) @ _end_to_end([o.gradients[0] for o in others]).mT
    sums = outer.mul_(inner).sum(0)  # [positions of all others]
    return torch.stack([part.sum() for part in torch.split(sums, [o.sizes[1] for o in others])])


def _end_to_end(parts: Sequence[Tensor]) -> Tensor:
    return widened(parts[0] if len(parts) == 1 else torch.cat(list(parts)))


def _product(left: LayerRecord, right: LayerRecord) -> Tensor:
    if isinstance(left, DenseRecord) and isinstance(right, DenseRecord):
        return torch.dot(left.values.reshape(-1), right.values.reshape(-1))
    return left.dot_products(right)[0, 0]


class _Remembered:
    """What was made for a component, found again by the next few that have the same inputs."""

    def __init__(self) -> None:
        self._found: deque[dict[Key, Tensor]] = deque(maxlen=REMEMBERED)

    def next_component(self) -> None:
        self._found.append({})

    def once(self, keys: Key, make: Callable[[], Tensor]) -> Tensor:
        found = next((made[keys] for made in self._found if keys in made), None)
        self._found[-1][keys] = make() if found is None else found
        return self._found[-1][keys]


def _wide(record: LayerRecord) -> LayerRecord:
    """In float32 or wider."""
    if isinstance(record, FactoredRecord):
        return replace(record, inputs=widened(record.inputs), gradients=widened(record.gradients))
    if isinstance(record, IndexedRecord):
        return replace(record, gradients=widened(record.gradients))
    if isinstance(record, SumRecord):
        return replace(record, parts=tuple(_wide(part) for part in record.parts))
    return DenseRecord(record.ids, widened(record.example_gradients()))
