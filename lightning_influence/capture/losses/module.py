"""The loss that a module defines itself."""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

from torch import Tensor, nn

from lightning_influence.capture.losses.base import Batch, ExampleLoss
from lightning_influence.capture.sampling import Uniforms


@runtime_checkable
class HasExampleLosses(Protocol):
    """A module that defines its own per-example loss."""

    def example_losses(self, batch: Batch) -> Tensor:
        """Loss of each example, [n]."""


class ModuleLoss(ExampleLoss):
    """The module's own ``example_losses(batch) -> [n]``.

    For a sampled Fisher it also defines ``sampled_example_losses(batch, uniforms) -> [n]``, where
    ``uniforms(counters)`` gives one number in (0, 1) for each integer counter [n, ...].
    """

    reduction = "defined by the module"

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[n].

        Raises:
            ValueError: If the module does not define it.
        """
        if not isinstance(model, HasExampleLosses):
            raise ValueError(f"ModuleLoss: {type(model).__name__} does not define example_losses(batch) -> [n].")
        return model.example_losses(batch)

    def sampled_losses(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Tensor:
        """[n].

        Raises:
            ValueError: If the module cannot sample.
        """
        sampled = getattr(model, "sampled_example_losses", None)
        if sampled is None:
            raise ValueError(
                f"{type(model).__name__} defines example_losses but not sampled_example_losses(batch, uniforms), "
                "which a sampled-label Fisher needs. Define it, or ask for fisher='empirical'."
            )
        return cast(Tensor, sampled(batch, uniforms))
