"""How far a step moves each component: its learning rate, as the optimizers of a running Trainer have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_influence.capture.component import Component

FILE = "learning_rates"  # name of the JSON in the store of a recording


@dataclass(frozen=True)
class LearningRates:
    """Learning rate of each component at one moment of the training.

    A parameter's rate is the ``lr`` of the optimizer's group that holds the very same tensor, the largest where several
    optimizers do; one that no optimizer holds does not move, so its rate is 0. A component whose parameters have
    several rates has their mean by number of parameters: its gradient's inner products are kept as one number, which
    only one rate can multiply.

    Attributes:
        next: In force when the weights were recorded, so that of the next step, unless a scheduler or another hook
            changes it before then (schedulers that step by epoch do so after the validation). By component.
        last: Of the last step that was taken before, by component; None where this process has seen none: it has just
            been resumed, or the module steps its optimizers past Lightning.
        not_optimized: Components with parameters that no optimizer holds.
        several: Components whose parameters have different rates, with these rates in force.
    """

    next: Mapping[str, float]
    last: Mapping[str, float] | None
    not_optimized: tuple[str, ...] = ()
    several: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As it is written to a store."""
        return {
            "next": dict(self.next),
            "last": None if self.last is None else dict(self.last),
            "not_optimized": list(self.not_optimized),
            "several": {name: list(rates) for name, rates in self.several.items()},
        }


class LearningRateWatch:
    """Notes the rates of the steps that are taken, and reads those in force."""

    def __init__(self) -> None:
        self._last: dict[int, list[Any]] = {}

    def start(self) -> None:
        """Forget the steps of another fit."""
        self._last = {}

    def note(self, optimizer: Optimizer) -> None:
        """A step is about to be taken: for ``on_before_optimizer_step``."""
        self._last[id(optimizer)] = [_copied(group["lr"]) for group in optimizer.param_groups]

    def of(self, trainer: Trainer, model: nn.Module, components: Sequence[Component]) -> LearningRates:
        """Those of some components of the model, now."""
        now = _by_parameter(
            trainer.optimizers, {id(o): [group["lr"] for group in o.param_groups] for o in trainer.optimizers}
        )
        rates = {c.name: _sizes_by_rate(model, c, now) for c in components}
        last = None
        if all(len(self._last.get(id(o), ())) == len(o.param_groups) for o in trainer.optimizers):
            found = _by_parameter(trainer.optimizers, self._last)
            last = {c.name: _mean(_sizes_by_rate(model, c, found)) for c in components}
        distinct = {name: tuple(sorted({rate or 0.0 for rate, _ in found})) for name, found in rates.items()}
        return LearningRates(
            next={name: _mean(found) for name, found in rates.items()},
            last=last,
            not_optimized=tuple(name for name, found in rates.items() if any(rate is None for rate, _ in found)),
            several={name: values for name, values in distinct.items() if len(values) > 1},
        )


def _copied(rate: Any) -> Any:
    """Capturable optimizers keep the rate in a tensor, which changes in place; it is not waited for here."""
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def _by_parameter(optimizers: Iterable[Optimizer], rates: Mapping[int, Sequence[Any]]) -> dict[int, float]:
    """Rate of each parameter, by identity; where several optimizers hold it, the largest of theirs."""
    found: dict[int, float] = {}
    for optimizer in optimizers:
        for group, rate in zip(optimizer.param_groups, rates[id(optimizer)], strict=True):
            for parameter in group["params"]:
                found[id(parameter)] = max(float(rate), found.get(id(parameter), 0.0))
    return found


def _sizes_by_rate(
    model: nn.Module, component: Component, rates: Mapping[int, float]
) -> list[tuple[float | None, int]]:
    """(rate, number of parameters) of each parameter; None: no optimizer holds it."""
    parameters = [model.get_parameter(name) for name in component.parameters]
    return [(rates.get(id(parameter)), parameter.numel()) for parameter in parameters]


def _mean(rates: Sequence[tuple[float | None, int]]) -> float:
    """By number of parameters; exact where all have the same."""
    first = rates[0][0] or 0.0
    if all((rate or 0.0) == first for rate, _ in rates):
        return first
    return sum((rate or 0.0) * size for rate, size in rates) / sum(size for _, size in rates)
