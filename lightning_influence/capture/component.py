"""Which parameters of a model are looked at: blocks of them, whose gradients are kept apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_influence.capture.layers import FALLBACK, LayerRule, rule_for
from lightning_influence.capture.owners import Select as Select
from lightning_influence.capture.owners import owners_of, taken
from lightning_influence.errors import UnsupportedLayerError


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


@dataclass(frozen=True)
class Coverage:
    """Which of a model's trainable parameters the components cover.

    Attributes:
        covered: Number of trainable parameters that belong to a component.
        total: Number of trainable parameters.
        missing: Qualified names of trainable parameters that belong to none.
    """

    covered: int
    total: int
    missing: tuple[str, ...]

    def __str__(self) -> str:
        """One line for a log."""
        share = 100 * (1 - self.covered / max(1, self.total))
        left = f"; left out ({share:.3g} %): {', '.join(self.missing[:8])}" if self.missing else ""
        more = f" and {len(self.missing) - 8} more" if len(self.missing) > 8 else ""
        return f"{self.covered:,} of {self.total:,} trainable parameters covered{left}{more}"


def find_components(model: nn.Module, select: Select = None) -> list[Component]:
    """Find the components of a model, in the order of its modules.

    Args:
        model: Any module. It is only read.
        select: ``None`` for everything trainable; a preset (``"all-linear"``, ``"mlp"``, ``"attention"``,
            ``"embedding"``, ``"lora"``), the name of a module or component, or a regular expression searched in
            module names; an iterable of those, such as a `ComponentSelection`; or a callable
            ``(module name, module) -> bool``. A frozen layer that is named is taken with all its parameters; of a
            partly trainable one the trainable parameters are taken.
            A parameter that several modules use is taken with all of them; a head that is tied to an embedding
            belongs to ``"embedding"``, not to ``"all-linear"``.

    Raises:
        ValueError: If a name or expression matches no module with parameters.
        UnsupportedLayerError: If nothing is left to look at.
    """
    owners = owners_of(model)
    wanted = taken(owners, select)
    users: dict[int, list[tuple[str, str]]] = {}
    for owner in owners:
        for local, parameter in owner.parameters.items():
            if id(parameter) in wanted:
                users.setdefault(id(parameter), []).append((owner.name, local))
    # Parameters that the same modules share belong together.
    groups: dict[tuple[str, ...], list[list[tuple[str, str]]]] = {}
    for uses in users.values():
        groups.setdefault(tuple(module for module, _ in uses), []).append(uses)
    components = [
        _component(model, _label(modules, group[0], groups), _uses(modules, group)) for modules, group in groups.items()
    ]
    if not components:
        raise UnsupportedLayerError(
            f"find_components(select={select!r}): {type(model).__name__} has no component left. Expected at least "
            "one module with trainable parameters; name frozen layers explicitly, for example select='all-linear'."
        )
    return components


def coverage_of(model: nn.Module, components: Iterable[Component]) -> Coverage:
    """How much of a model's trainable parameters some components cover."""
    covered = {
        id(model.get_submodule(use.module).get_parameter(p))
        for c in components
        for use in c.uses
        for p in use.parameters
    }
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    missing = {n: p.numel() for n, p in trainable if id(p) not in covered}
    total = sum(p.numel() for _, p in trainable)
    return Coverage(total - sum(missing.values()), total, tuple(missing))


def check_components(model: nn.Module, components: Sequence[Component]) -> None:
    """Refuse components that are not this model's, such as those of another architecture.

    Raises:
        ValueError: Naming every component that differs, and how.
    """
    problems = []
    for component in components:
        try:
            found: object = _component(model, component.name, component.uses)
        except AttributeError as error:
            found = error
        if found != component:
            problems.append(
                f"{component.name}: {found if isinstance(found, Exception) else 'has another shape or kind'}"
            )
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(components)} components are not those of this {type(model).__name__}: "
            f"{'; '.join(problems[:8])}. Expected components of the same architecture; see find_components(model)."
        )


def packing(model: nn.Module, uses: Sequence[Use]) -> LayerRule:
    """The rule in whose form a component's gradient is kept: that of its modules when they agree.

    Modules that share a parameter but would arrange it differently (an embedding and a transposed head) are kept
    as one flat vector, which is the form of the fallback.
    """
    forms = {_form(model, use) for use in uses}
    return rule_for(model.get_submodule(uses[0].module)) if len(forms) == 1 else FALLBACK


def parameter_gradients(model: nn.Module, component: Component, gradients: Tensor) -> dict[str, Tensor]:
    """Take a component's gradients apart: [n, *component.shape] -> qualified name -> [n, *parameter.shape].

    >>> model = nn.Linear(2, 3)
    >>> [component] = find_components(model)
    >>> {name: g.shape for name, g in parameter_gradients(model, component, torch.zeros(4, 3, 3)).items()}
    {'weight': torch.Size([4, 3, 2]), 'bias': torch.Size([4, 3])}
    """
    use = component.uses[0]
    parts = packing(model, component.uses).split(model.get_submodule(use.module), use.parameters, gradients)
    return {_join(use.module, local): parts[local] for local in use.parameters}


def _form(model: nn.Module, use: Use) -> tuple[object, ...]:
    """Two uses with the same form arrange a gradient in the same way."""
    module = model.get_submodule(use.module)
    rule = rule_for(module)
    shape = rule.shape(module, use.parameters)
    parts = rule.split(module, use.parameters, torch.empty(1, *shape, device="meta"))
    return (shape, *((parts[p].shape, parts[p].stride()) for p in use.parameters))


def _component(model: nn.Module, name: str, uses: tuple[Use, ...]) -> Component:
    first = uses[0]
    rule = packing(model, uses)
    shape = rule.shape(model.get_submodule(first.module), first.parameters)
    return Component(name, rule.kind, uses, tuple(_join(first.module, p) for p in first.parameters), shape)


def _uses(modules: tuple[str, ...], group: list[list[tuple[str, str]]]) -> tuple[Use, ...]:
    return tuple(Use(module, tuple(users[k][1] for users in group)) for k, module in enumerate(modules))


def _label(modules: tuple[str, ...], users: list[tuple[str, str]], groups: Iterable[tuple[str, ...]]) -> str:
    """The name of the module, with that of a parameter where the module has further ones in other components."""
    alone = len(modules) == 1 or sum(other[0] == modules[0] for other in groups) == 1
    return modules[0] if alone else _join(*users[0])


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter
