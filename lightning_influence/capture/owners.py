"""Which module's calls use a parameter, and how a user names modules."""

from __future__ import annotations

import difflib
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
    """Identities of the parameters to look at; complex ones have no real gradient and are left out.

    Raises:
        ValueError: If a name or expression matches nothing, or is no regular expression.
    """
    if select is None:
        return {id(p) for owner in owners for p in _real(owner) if p.requires_grad}
    if callable(select):
        return _of_all(owner for owner in owners if any(select(label, owner.module) for label in owner.labels))
    kinds: dict[int, str] = {}  # of the first module that holds a parameter: a tied head counts as the embedding
    for owner in owners:
        for parameter in owner.parameters.values():
            kinds.setdefault(id(parameter), rule_for(owner.module).kind)
    wants = [select] if isinstance(select, str) else list(select)
    return {found for want in wants for found in _named(want, owners, kinds)}


def _named(want: str, owners: list[Owner], kinds: dict[int, str]) -> set[int]:
    """Parameters of the modules that are called so or else match; or of the one component that is called so."""
    exact = [owner for owner in owners if want in owner.labels and want not in PRESETS]
    hits = exact or [owner for owner in owners if _matches(want, owner, kinds)]
    found = _of_all(hits) if hits else _component(want, owners)
    if not found:
        names = [owner.name for owner in owners]
        near = difflib.get_close_matches(want, [*PRESETS, *names], n=3, cutoff=0.0)
        raise ValueError(
            f"find_components(select={want!r}): no module with parameters matches. Expected one of the presets "
            f"{sorted(PRESETS)}, a module name or a regular expression; the nearest are {near}, and the model has "
            f"{names[:8]}..."
        )
    return found


def _of_all(owners: Iterable[Owner]) -> set[int]:
    """What is trainable of each module, or everything of one that is frozen."""
    found: set[int] = set()
    for owner in owners:
        real = _real(owner)
        trainable = [p for p in real if p.requires_grad]
        found |= {id(p) for p in trainable or real}
    return found


def _component(want: str, owners: list[Owner]) -> set[int]:
    """A component with the name of a parameter: it is one of several in its module, and those it is tied with."""
    users: dict[int, list[str]] = {}
    for owner in owners:
        for parameter in _real(owner):
            users.setdefault(id(parameter), []).append(owner.name)
    named = [id(p) for o in owners for k, p in o.parameters.items() if f"{o.name}.{k}".lstrip(".") == want]
    return {key for key, names in users.items() if named and names == users.get(named[0])}


def _real(owner: Owner) -> list[nn.Parameter]:
    return [p for p in owner.parameters.values() if p.is_floating_point()]


def _matches(want: str, owner: Owner, kinds: dict[int, str]) -> bool:
    if want in ("all-linear", "embedding"):
        first = next(iter(owner.parameters.values()))
        return kinds[id(first)] == {"all-linear": "linear", "embedding": "embedding"}[want]
    pattern = PRESETS.get(want) or want
    try:
        return any(re.search(pattern, label) is not None for label in owner.labels)
    except re.error as error:
        raise ValueError(
            f"find_components(select={want!r}): this is no regular expression ({error}). Expected one, such as 'lora' "
            "or 'layers.[0-3].mlp', which is looked for anywhere in a module's name: no star is needed around it."
        ) from error
