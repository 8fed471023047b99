"""Components of one kind: all query projections, all up projections, the embedding."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from lightning_influence.selection.component_pairs import component_rows

_EMBEDDING = re.compile(r"(^|_)(embed|embedding|embeddings|wte|wpe)(_|$)")
_NOT_A_KIND = {"weight", "bias", "default", "base_layer", "modules_to_save"}


def kind_of(name: str) -> str:
    """The last part of a component's name that says something: not a number, ``weight`` or an adapter's name.

    Everything that embeds is one kind, and the two matrices of a LoRA adapter are kinds of their own.

    >>> kind_of("model.layers.3.self_attn.q_proj"), kind_of("model.embed_tokens"), kind_of("net.0")
    ('q_proj', 'embedding', 'net')
    >>> kind_of("model.layers.3.self_attn.q_proj.lora_A.default")
    'q_proj.lora_A'
    """
    parts = [part for part in name.split(".") if part not in _NOT_A_KIND and not part.isdigit()]
    if not parts:
        return name
    if parts[-1].startswith("lora_") and len(parts) > 1:
        return ".".join(parts[-2:])
    return "embedding" if _EMBEDDING.search(parts[-1]) else parts[-1]


def component_kinds(
    components: Sequence[str], kinds: Mapping[str, str] | Callable[[str], str] | None = None
) -> dict[str, list[str]]:
    """Names of the components of each kind, kinds in the order in which they first come.

    Args:
        components: Names.
        kinds: Kind by name, for some or all of the components; a function of the name; None: `kind_of`. Components
            that a mapping leaves out are of no kind.

    Raises:
        ValueError: If a name in the mapping is no component's (the nearest are given).
    """
    if isinstance(kinds, Mapping):
        component_rows(components, list(kinds), "evaluate_retrieval(kinds={})")
        found = {name: kinds[name] for name in components if name in kinds}
    else:
        found = {name: (kinds or kind_of)(name) for name in components}
    groups: dict[str, list[str]] = {}
    for name, kind in found.items():
        groups.setdefault(kind, []).append(name)
    return groups
