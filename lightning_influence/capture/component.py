"""Which parameters of a model are looked at: components, and how a user names them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, TypeAlias

from torch import nn

from lightning_influence.capture.layers import LayerRule, rule_for
from lightning_influence.errors import UnsupportedLayerError

Selector: TypeAlias = Callable[[str, nn.Module], bool]
Select: TypeAlias = str | Iterable[str] | Selector | None


class Use(NamedTuple):
    """The part of one module that belongs to a component."""

    module: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Component:
    """One block of parameters whose per-example gradient is kept apart from the others.

    Usually the weight of one layer with its bias. Parameters shared by several modules (tied embedding and
    output head) form one component with several uses, so that their gradients are added.

    Attributes:
        name: Qualified name of the first module that uses it; unique within a model.
        kind: Family of the layer: ``"linear"``, ``"embedding"``, ``"conv"``, ``"norm"`` or ``"other"``.
        uses: Modules, and their own names of the parameters, that make up the component.
        parameters: Qualified names of the parameters, in the order in which they fill the gradient.
        shape: Shape of the gradient of one example. Layers that multiply have ``(o, i + bias)``, the bias as
            last column (homogeneous coordinate).
    """

    name: str
    kind: str
    uses: tuple[Use, ...]
    parameters: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return prod(self.shape)


PRESETS: dict[str, str | None] = {
    "all-linear": None,
    "mlp": r"(^|\.)(mlp|ffn|feed_forward)(\.|$)|(^|\.)(gate|up|down)_proj(\.|$)|(^|\.)fc[12](\.|$)",
    "attention": r"(^|\.)(self_attn|attn|attention|self_attention)(\.|$)|(^|\.)[qkvo]_proj(\.|$)",
    "embedding": None,
    "lora": r"(^|\.)lora_",
}


def find_components(model: nn.Module, select: Select = None) -> list[Component]:
    """Find the components of a model, in the order of its modules.

    Args:
        model: Any module. It is only read.
        select: ``None`` for everything trainable; a preset (``"all-linear"``, ``"mlp"``, ``"attention"``,
            ``"embedding"``, ``"lora"``), a module name or a regular expression searched in module names; an
            iterable of those; or a callable ``(module name, module) -> bool``. A frozen layer that is named
            is taken with all its parameters; of a partly trainable one the trainable parameters are taken.

    Raises:
        ValueError: If a name or expression matches no module with parameters.
        UnsupportedLayerError: If nothing is left to look at.
    """
    owners = _owners(model, select)
    users: dict[int, list[tuple[str, str]]] = {}
    for name, (module, own) in owners.items():
        for local in own:
            users.setdefault(id(module.get_parameter(local)), []).append((name, local))
    components = []
    for name, (module, own) in owners.items():
        alone = tuple(p for p in own if len(users[id(module.get_parameter(p))]) == 1)
        if alone:
            components.append(_component(model, name, (Use(name, alone),)))
        for local in own:
            shared = users[id(module.get_parameter(local))]
            if len(shared) > 1 and shared[0] == (name, local):
                label = name if not alone else f"{name}.{local}"
                components.append(_component(model, label, tuple(Use(m, (p,)) for m, p in shared)))
    if not components:
        raise UnsupportedLayerError(
            f"find_components(select={select!r}): {type(model).__name__} has no component left. Expected at least "
            "one module with trainable parameters; name frozen layers explicitly, for example select='all-linear'."
        )
    return components


def _component(model: nn.Module, name: str, uses: tuple[Use, ...]) -> Component:
    module = model.get_submodule(uses[0].module)
    rule = rule_for(module, uses[0].parameters)
    parameters = tuple(f"{uses[0].module}.{p}".lstrip(".") for p in uses[0].parameters)
    return Component(name, rule.kind, uses, parameters, rule.shape(module, uses[0].parameters))


def _owners(model: nn.Module, select: Select) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """Module name -> (module, its own parameters to cover).

    Selection is by module; a tied parameter is covered wholly when one of its modules is selected.
    """
    everything: dict[str, tuple[nn.Module, LayerRule]] = {}
    skip: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if skip and name.startswith(skip):
            continue
        rule = rule_for(module, tuple(k for k, p in module._parameters.items() if p is not None))
        if name and rule.claims_children(module):
            skip += (f"{name}.",)
        everything[name] = (module, rule)
    chosen = {n: m for n, (m, _) in everything.items() if any(True for _ in _own(m, everything[n][1]))}
    if select is not None:
        chosen = _select(chosen, select)
    taken = {id(p) for n, m in chosen.items() for _, p in _trainable(m, everything[n][1], select is not None)}
    owners = {}
    for name, (module, rule) in everything.items():
        own = tuple(k for k, p in _own(module, rule) if id(p) in taken)
        if own:
            owners[name] = (module, own)
    return owners


def _own(module: nn.Module, rule: LayerRule) -> Iterable[tuple[str, nn.Parameter]]:
    return module.named_parameters(recurse=rule.claims_children(module))


def _trainable(module: nn.Module, rule: LayerRule, explicit: bool) -> list[tuple[str, nn.Parameter]]:
    own = list(_own(module, rule))
    trainable = [(k, p) for k, p in own if p.requires_grad]
    return own if explicit and not trainable else trainable


def _select(modules: dict[str, nn.Module], select: Select) -> dict[str, nn.Module]:
    if callable(select):
        return {n: m for n, m in modules.items() if select(n, m)}
    wanted = [select] if isinstance(select, str) else list(select or ())
    found: set[str] = set()
    for want in wanted:
        hits = {n for n, m in modules.items() if _matches(want, n, m)}
        if not hits:
            raise ValueError(
                f"find_components(select={want!r}): no module with parameters matches. Expected one of the presets "
                f"{sorted(PRESETS)}, a module name or a regular expression; the model has {list(modules)[:8]}..."
            )
        found |= hits
    return {n: m for n, m in modules.items() if n in found}


def _matches(want: str, name: str, module: nn.Module) -> bool:
    if want in ("all-linear", "embedding"):
        own = tuple(k for k, p in module._parameters.items() if p is not None)
        return rule_for(module, own).kind == {"all-linear": "linear", "embedding": "embedding"}[want]
    pattern = PRESETS.get(want)
    return name == want or re.search(want if pattern is None else pattern, name) is not None
