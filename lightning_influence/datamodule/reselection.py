"""When to choose again while a fit is running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_influence.capture.guard import unchanged
from lightning_influence.curvature import Curvature


class Reselection:
    """At the start of epochs n, 2n, ... of a fit, counted from 0, and once in each.

    Args:
        every: n, an int >= 1.
        budget: How much is selected.
        curvature: Fitted anew every time; None for the default.

    Attributes:
        epoch: Of the last time in this fit, which a resumed fit goes on from; None before.

    Raises:
        ValueError: If n is none, or the others cannot be used again and again.
    """

    def __init__(self, every: int, budget: object, curvature: Curvature | None) -> None:
        if type(every) is not int or every < 1:
            raise ValueError(f"`DataSelector(reselect_every_n_epochs={every!r})`: expected an int >= 1, or None.")
        call = f"DataSelector(reselect_every_n_epochs={every}"
        if budget is None:
            raise ValueError(f"`{call}, budget=None)`: expected an int >= 1 or a fraction in (0, 1] to select.")
        if curvature is not None and curvature.fitted:
            raise ValueError(
                f"`{call}, curvature={type(curvature).__name__})`: it is fitted to other weights than those the model "
                "will have by then. Expected one that is not fitted."
            )
        self.every = every
        self._is_checked = False
        self.epoch: int | None = None

    def begin(self, trainer: Any) -> None:
        """A fit begins.

        Raises:
            MisconfigurationException: If the Trainer reads the loader once per fit, or not in every epoch.
        """
        self.epoch, self._is_checked = None, False
        reload = None if trainer is None else trainer.reload_dataloaders_every_n_epochs
        if reload not in (None, 1):
            raise MisconfigurationException(
                f"`DataSelector(reselect_every_n_epochs={self.every})`: this Trainer has "
                f"reload_dataloaders_every_n_epochs={reload} and would go on with the old rows. Expected "
                "`Trainer(reload_dataloaders_every_n_epochs=1)`."
            )

    def check(self, trainer: Any, look: Callable[[nn.Module], None]) -> None:
        """That a choice can be made, told at the first epoch of a fit and not at the n-th.

        Args:
            trainer: None if there is none.
            look: Looks at a batch with the model, and raises.
        """
        if self._is_checked or trainer is None or not trainer.training:
            return
        model = trainer.lightning_module
        with unchanged(model):
            look(model)
        self._is_checked = True

    def is_due(self, trainer: Any) -> bool:
        """Whether the epoch that a Trainer asks a loader for begins with a new choice."""
        if trainer is None or not trainer.training:
            return False
        epoch: int = trainer.current_epoch
        return epoch > 0 and epoch % self.every == 0 and epoch != self.epoch
