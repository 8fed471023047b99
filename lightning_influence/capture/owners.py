"""Which module's calls use a parameter, and how a user names modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from lightning_influence.capture.forward import runner
from lightning_influence.capture.layers import rule_for

Selector: TypeAlias = Callable[[str, nn.Module], bool]
Select: TypeAlias = str | Iterable[str] | Selector | None

PRESETS: dict[str, str | None] = {
    "all-linear": None,
    "mlp": r"(^|\.)(mlp|ffn|feed_forward)(\.|$)|(^|\.)(gate|up|down)_proj(\.|$)|(^|\.)fc[12](\.|$)",
    "attention": r"(^|\.)(self_attn|attn|attention|self_attention)(\.|$)|(^|\.)[qkvo]_proj(\.|$)",
    "embedding": None,
    "lora": r"(^|\.)lora_",
}


@dataclass
class Owner:
    """A module whose calls use the parameters: they are its own, or those of a container that is never called.

    Attributes:
        name: Its qualified name.
        module: The module.
        labels: Names that select it: its own and those of its containers.
        parameters: The parameters, by their name within it.
    """

    name: str
    module: nn.Module
    labels: list[str]
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


def owners_of(model: nn.Module) -> list[Owner]:
    """All modules that own parameters, in the order of the modules."""
    owners: dict[str, Owner] = {}
    for name, own in _holders(model):
        caller = runner(model, name)
        owner = owners.setdefault(caller, Owner(caller, model.get_submodule(caller), [caller]))
        if name != caller:
            owner.labels.append(name)
        known = {id(p) for p in owner.parameters.values()}
        inside = name[len(caller) :].lstrip(".")
        owner.parameters.update({f"{inside}.{k}".lstrip("."): p for k, p in own if id(p) not in known})
    return [owner for owner in owners.values() if owner.parameters]


def _holders(model: nn.Module) -> Iterator[tuple[str, list[tuple[str, nn.Parameter]]]]:
    """Modules in order, each with the parameters that it holds, or that it claims from its children."""
    claimed: str | None = None
    for name, module in model.named_modules():
        if claimed is not None and name.startswith(claimed):
            continue
        claims = rule_for(module).claims_children(module)
        if claims:
            claimed = f"{name}." if name else ""
        yield name, list(module.named_parameters(recurse=claims))


def taken(owners: list[Owner], select: Select) -> set[int]:
    """Identities of the parameters to look at; complex ones have no real gradient and are left out."""
    found: set[int] = set()
    for owner in owners if select is None else _selected(owners, select):
        real = [p for p in owner.parameters.values() if p.is_floating_point()]
        trainable = [p for p in real if p.requires_grad]
        found |= {id(p) for p in (real if select is not None and not trainable else trainable)}
    return found


def _selected(owners: list[Owner], select: Select) -> list[Owner]:
    if callable(select):
        return [owner for owner in owners if any(select(label, owner.module) for label in owner.labels)]
    kinds: dict[int, str] = {}  # of the first module that holds a parameter: a tied head counts as the embedding
    for owner in owners:
        for parameter in owner.parameters.values():
            kinds.setdefault(id(parameter), rule_for(owner.module).kind)
    found: set[str] = set()
    for want in [select] if isinstance(select, str) else list(select or ()):
        hits = {owner.name for owner in owners if _matches(want, owner, kinds)}
        if not hits:
            raise ValueError(
                f"find_components(select={want!r}): no module with parameters matches. Expected one of the presets "
                f"{sorted(PRESETS)}, a module name or a regular expression; the model has "
                f"{[owner.name for owner in owners][:8]}..."
            )
        found |= hits
    return [owner for owner in owners if owner.name in found]


def _matches(want: str, owner: Owner, kinds: dict[int, str]) -> bool:
    if want in ("all-linear", "embedding"):
        first = next(iter(owner.parameters.values()))
        return kinds[id(first)] == {"all-linear": "linear", "embedding": "embedding"}[want]
    pattern = PRESETS.get(want) or want
    return any(want == label or re.search(pattern, label) is not None for label in owner.labels)
