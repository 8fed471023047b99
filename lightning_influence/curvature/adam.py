"""Where Adam would go: the moments of a running optimizer, and the step that it would take on one example."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import Adamax, NAdam, Optimizer, RAdam
from typing_extensions import Self

from lightning_influence.capture import Component, parameter_gradients

Variant: TypeAlias = Literal["less", "less_repo"]
MOMENTS = ("exp_avg", "exp_avg_sq")  # as Adam, AdamW and what follows them in torch call them


@dataclass(frozen=True)
class AdamState:
    """What Adam knows of a component beside its moments.

    Attributes:
        step: Steps taken.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
    """

    step: int
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass(frozen=True, eq=False)
class AdamMoments:
    """Adam's moments of some components at one moment of a training, in the form of their gradients.

    Attributes:
        first: m by component, [*component.shape], float32 at least.
        second: v by component, likewise.
        states: The rest by component.
    """

    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    states: Mapping[str, AdamState]

    @classmethod
    def from_optimizers(
        cls, model: nn.Module, components: Sequence[Component], optimizers: Optimizer | Iterable[Optimizer]
    ) -> Self:
        """Those that optimizers hold now, found by the identity of the parameters and copied.

        Neither the order of the parameters in the optimizer nor their names matter.

        Args:
            model: Whose parameters the optimizers move.
            components: From `find_components`.
            optimizers: Of torch, such as ``trainer.optimizers``.

        Raises:
            ValueError: If a component has no Adam moments there, and why: none of the optimizers holds it, or several
                do; the optimizer keeps none, or has taken no step; or its parameters are treated differently.
        """
        held = _held(optimizers)
        first: dict[str, Tensor] = {}
        second: dict[str, Tensor] = {}
        states: dict[str, AdamState] = {}
        problems: list[str] = []
        for component in components:
            found = [_state_of(model.get_parameter(name), held) for name in component.parameters]
            problem = next((text for text in found if isinstance(text, str)), None)
            whole = [pair for pair in found if not isinstance(pair, str)]
            if problem is None and len({state for _, state in whole}) > 1:
                problem = f"its parameters differ in steps, betas or eps: {[asdict(state) for _, state in whole]}"
            if problem is not None:
                problems.append(f"{component.name}: {problem}")
                continue
            states[component.name] = whole[0][1]
            for moments, key in ((first, MOMENTS[0]), (second, MOMENTS[1])):
                parts = {name: pair[0][key] for name, pair in zip(component.parameters, whole, strict=True)}
                moments[component.name] = packed(model, component, parts)
        if problems:
            raise ValueError(
                f"`AdamMoments.from_optimizers`: {len(problems)} of {len(components)} components have no Adam moments "
                f"({'; '.join(problems[:4])}). Expected components that Adam or AdamW has taken a step on."
            )
        return cls(first, second, states)

    @classmethod
    def fresh(cls, model: nn.Module, components: Sequence[Component]) -> Self:
        """Those of Adam before its first step: zeros, with torch's default betas and eps."""
        zeros = {c.name: torch.zeros(c.shape, device=model.get_parameter(c.parameters[0]).device) for c in components}
        return cls(zeros, zeros, dict.fromkeys(zeros, AdamState(0)))

    def direction(self, name: str, gradients: Tensor, variant: Variant = "less") -> Tensor:
        """Γ, the step over the learning rate if the next gradient were that of one example: θ becomes θ - η Γ.

        With m = β1 m + (1 - β1) g and v = β2 v + (1 - β2) g² (methods: Adam preconditioning, [LESS] section 3.1):

        * ``"less"``, as in the paper and in torch's Adam: m̂ / (√v̂ + ε) with m̂ = m / (1 - β1ᵗ), v̂ = v / (1 - β2ᵗ), t the
          number of this step, and the optimizer's own β1, β2 and ε;
        * ``"less_repo"``, as in the authors' code: m / √(v + 1e-8), with β = (0.9, 0.999) whatever the optimizer's.

        Both work entry by entry, and hold g², so that Γ comes before any projection and of whole gradients.

        Args:
            name: The component.
            gradients: Of examples, [n, *shape].
            variant: One of the two above.

        Returns:
            [n, *shape], in the dtype of the gradients.

        Raises:
            ValueError: If the variant is neither.
        """
        check_variant("AdamMoments.direction", variant)
        state = self.states[name] if variant == "less" else AdamState(0)
        m = state.beta1 * self.first[name].to(gradients) + (1 - state.beta1) * gradients
        v = state.beta2 * self.second[name].to(gradients) + (1 - state.beta2) * gradients.square()
        if variant == "less_repo":
            return m / (v + 1e-8).sqrt()
        t = state.step + 1
        return m / (1 - state.beta1**t) / ((v / (1 - state.beta2**t)).sqrt() + state.eps)


def check_variant(call: str, variant: object) -> None:
    """Refuse a variant that is none.

    Raises:
        ValueError: Naming those that are.
    """
    if variant not in get_args(Variant):
        raise ValueError(
            f"`{call}(variant={variant!r})`: expected 'less', with bias correction and eps beside the root as in the "
            "paper, or 'less_repo', without and with eps under the root as in the authors' code."
        )


def check_optimizers(model: nn.Module, components: Sequence[Component], optimizers: Iterable[Optimizer]) -> None:
    """Refuse, before the first step, optimizers that will have no Adam moments for some components.

    One that has them and steps otherwise (NAdam, RAdam, AMSGrad) is warned of: its steps are taken for Adam's.

    Raises:
        ValueError: Naming the components and why.
    """
    held, problems = _held(optimizers), []
    others: set[str] = set()
    for component in components:
        for parameter in (model.get_parameter(name) for name in component.parameters):
            found = held.get(id(parameter), [])
            if len(found) != 1:
                problems.append(f"{component.name}: {_count(len(found))}")
            elif not _is_adam(*found[0]):
                problems.append(f"{component.name}: {type(found[0][0]).__name__} keeps no moments of Adam")
            elif isinstance(found[0][0], (NAdam, RAdam)) or found[0][1].get("amsgrad"):
                others.add(type(found[0][0]).__name__ + ("(amsgrad=True)" if found[0][1].get("amsgrad") else ""))
    if problems:
        raise ValueError(
            f"some components will have no Adam moments ({'; '.join(list(dict.fromkeys(problems))[:4])}). Expected "
            "Adam or AdamW for every component; choose others with components=."
        )
    if others:
        warnings.warn(
            f"{', '.join(sorted(others))} keeps moments as Adam does and steps otherwise: LESS takes the step of Adam "
            "with these moments. Warm up with Adam or AdamW for that of the paper.",
            stacklevel=2,
        )


def _is_adam(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """As far as can be told before it has taken a step; Adamax keeps the largest gradient instead of v."""
    return {"betas", "eps"} <= group.keys() and len(group["betas"]) == 2 and not isinstance(optimizer, Adamax)


def packed(model: nn.Module, component: Component, parts: Mapping[str, Tensor]) -> Tensor:
    """Tensors like the parameters, put together as the component's gradient is: the inverse of `parameter_gradients`.

    Args:
        model: The model.
        component: One of its components.
        parts: By qualified name, each of the shape of the parameter.

    Returns:
        [*component.shape], float32 at least.

    >>> from lightning_influence.capture import find_components
    >>> layer = nn.Linear(2, 1)
    >>> [component] = find_components(layer)
    >>> packed(layer, component, {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
    tensor([[1., 2., 3.]])
    """
    first = next(iter(parts.values()))
    dtype = torch.promote_types(first.dtype, torch.float32)
    out = torch.zeros(component.numel, dtype=dtype, device=first.device)
    places = torch.arange(component.numel, device=first.device).reshape(1, *component.shape)
    for name, where in parameter_gradients(model, component, places).items():
        out[where.flatten()] = parts[name].detach().to(dtype).flatten()
    return out.reshape(component.shape)


def _held(optimizers: Optimizer | Iterable[Optimizer]) -> dict[int, list[tuple[Optimizer, dict[str, Any]]]]:
    """Optimizers and groups that hold each parameter, by its identity."""
    found: dict[int, list[tuple[Optimizer, dict[str, Any]]]] = {}
    for optimizer in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found.setdefault(id(parameter), []).append((optimizer, group))
    return found


def _state_of(
    parameter: nn.Parameter, held: Mapping[int, list[tuple[Optimizer, dict[str, Any]]]]
) -> tuple[Mapping[str, Tensor], AdamState] | str:
    """The moments of a parameter with the rest, or why there are none."""
    found = held.get(id(parameter), [])
    if len(found) != 1:
        return _count(len(found))
    [(optimizer, group)] = found
    state = optimizer.state.get(parameter, {})
    if not state:
        return f"{type(optimizer).__name__} has taken no step on it"
    if not {*MOMENTS, "step"} <= state.keys() or "betas" not in group:
        return f"{type(optimizer).__name__} keeps {sorted(map(str, state))}, not {', '.join(MOMENTS)}"
    beta1, beta2 = group["betas"]
    rest = AdamState(int(state["step"]), float(beta1), float(beta2), float(group["eps"]))
    return {key: state[key] for key in MOMENTS}, rest


def _count(optimizers: int) -> str:
    return "several optimizers hold it" if optimizers else "no optimizer holds it"
