"""Layer and kind of components, as their names tell or the caller does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from lightning_influence.evaluation.kinds import kind_of
from lightning_influence.report.component_tables import layer_of
from lightning_influence.selection.component_pairs import component_rows


class Place(NamedTuple):
    """Where a component stands; layer None: outside the layers."""

    layer: int | None
    kind: str


Places: TypeAlias = Mapping[str, tuple[int | None, str]] | Callable[[str], tuple[int | None, str]] | None


def find_places(components: Sequence[str], places: Places = None) -> list[Place]:
    """Layer and kind of each component, no two the same unless the caller says so.

    The layer is the first number in the name, and none for a component outside the layers. The kind is that of
    `kind_of`, the last part of the name that says something. Where two components of a layer would be of one kind,
    as the two ``c_proj`` of a GPT-2 block, kinds of that name are what follows the layer's number, or the last
    part of a name without one; where that is not enough (encoder and decoder), the whole name without the layer.

    >>> find_places(["transformer.h.3.attn.c_proj", "transformer.h.3.mlp.c_proj", "lm_head"])[1:]
    [Place(layer=3, kind='mlp.c_proj'), Place(layer=None, kind='lm_head')]

    Raises:
        ValueError: If a name in a mapping is no component's (the nearest are given).
    """
    if callable(places):
        return [Place(*places(name)) for name in components]
    given = dict(places or {})
    if given:
        component_rows(components, list(given), "find_places(places={})")
    own = [name for name in components if name not in given]
    kinds = {name: kind_of(name) for name in own}
    for longer in (_after_layer, _without_layer):
        taken: dict[Place, list[str]] = {}
        for name in own:
            taken.setdefault(Place(layer_of(name), kinds[name]), []).append(name)
        crowded = {place.kind for place, names in taken.items() if len(names) > 1}
        kinds = {name: longer(name) if kind in crowded else kind for name, kind in kinds.items()}
    return [Place(*given[name]) if name in given else Place(layer_of(name), kinds[name]) for name in components]


def _after_layer(name: str) -> str:
    """``mlp.c_proj`` of ``transformer.h.3.mlp.c_proj``; without a layer, or with nothing after it, the last part."""
    parts = name.split(".")
    number = next((k for k, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[number + 1 :]) or parts[-1]


def _without_layer(name: str) -> str:
    parts = name.split(".")
    number = next((k for k, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:number] + parts[number + 1 :]) or name
