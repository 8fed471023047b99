"""Batches as a model gets them in a fit, for passes that no Trainer makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.overrides import is_overridden
from torch import nn
from torch.utils.data import DataLoader

from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.capture.unfit import UnfitExamplesError, of_device
from lightning_influence.datamodule.wrapper import overrides

_BEFORE, _TRANSFER, _AFTER = HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
Convert = Callable[[Any], Any]


class Placed:
    """A collate function whose batches go on through conversion and hooks; equal to another of the same parts.

    Args:
        collate_fn: Makes a batch.
        convert: Brings it to the precision of the training; None where it has that.
        hooks: Of Lightning, bound, by name.
        device: Of the model.
    """

    def __init__(
        self, collate_fn: Callable[..., Any], convert: Convert | None, hooks: Mapping[str, Any], device: torch.device
    ) -> None:
        self._parts = (collate_fn, convert, dict(hooks), device)

    def __call__(self, rows: list[Any]) -> Any:
        """The batch of some rows."""
        collate_fn, convert, hooks, device = self._parts
        batch = collate_fn(rows)
        if convert is not None:
            batch = convert(batch)
        batch = self._hooked(_BEFORE, batch, 0)
        transfers = _TRANSFER in hooks
        batch = self._hooked(_TRANSFER, batch, device, 0) if transfers else move_data_to_device(batch, device)
        return self._hooked(_AFTER, batch, 0)

    def _hooked(self, name: str, batch: Any, *arguments: Any) -> Any:
        """What a hook makes of a batch; the batch where there is none."""
        hook = self._parts[2].get(name)
        if hook is None:
            return batch
        try:
            return hook(batch, *arguments)
        except Exception as error:
            if of_device(error):
                raise
            raise UnfitExamplesError(
                f"`{name}` fails on a batch ({type(error).__name__}: {error}). `DataSelector.select` looks at batches "
                "as a fit gets them: where the hook needs `self.trainer`, pass a model that a Trainer has fitted."
            ) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placed) and self._parts == other._parts

    __hash__ = None  # type: ignore[assignment]


def placed(data: Any, model: nn.Module, inner: Any, trainer: Any) -> Any:
    """Data whose batches are those that ``training_step`` gets: through the same hooks, in the same precision.

    Args:
        data: DataLoader, `ExampleLoader` or dataset, or several by name; returned as they are where a fit does nothing
            to a batch but move it.
        model: That looks at them.
        inner: The datamodule, whose hooks count before those of the model.
        trainer: None if there is none. Its precision counts for the model that it has trained.
    """
    if isinstance(data, Mapping):
        return {name: placed(part, model, inner, trainer) for name, part in data.items()}
    module = getattr(model, "_orig_mod", model)  # torch.compile(module) is another, and fits as the one inside
    convert, hooks = _conversion(module, trainer), _hooks(module, inner)
    if convert is None and not hooks:
        return data
    plain = data if isinstance(data, ExampleLoader | DataLoader) else ExampleLoader(data)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return ExampleLoader(plain, collate_fn=Placed(plain.collate_fn, convert, hooks, device))


def _conversion(model: nn.Module, trainer: Any) -> Convert | None:
    """What a Trainer does to the numbers of a batch, where they come out as the model's are."""
    if trainer is None or trainer.lightning_module is not model:
        return None
    convert: Convert = trainer.precision_plugin.convert_input
    dtype = convert(torch.zeros(1)).dtype
    return convert if dtype != torch.float32 and dtype in {p.dtype for p in model.parameters()} else None


def _hooks(model: nn.Module, inner: Any) -> dict[str, Any]:
    """Those that the datamodule defines, and else the model."""
    module = next((cls for cls in type(model).__mro__ if cls.__name__ == "LightningModule"), None)
    found = {hook: getattr(model, hook) for hook in HOOKS if module and is_overridden(hook, model, module)}
    return found | {hook: getattr(inner, hook) for hook in HOOKS if overrides(inner, hook)}
