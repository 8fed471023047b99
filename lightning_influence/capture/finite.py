"""Examples whose loss or gradient is no number: named, or left out where that is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_influence.capture.batches import to_device
from lightning_influence.capture.contexts import evaluating
from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.capture.losses import ExampleLoss, resolve_loss
from lightning_influence.capture.unfit import run_batch

NanPolicy: TypeAlias = Literal["raise", "omit"]


def check_nan_policy(call: str, policy: str) -> None:
    """Refuse a policy that is none.

    Raises:
        ValueError: Unless it is ``"raise"`` or ``"omit"``.
    """
    if policy not in get_args(NanPolicy):
        raise ValueError(f"`{call}(nan_policy={policy!r})`: expected 'raise' (an error that names them) or 'omit'.")


def check_gradients(ids: Sequence[int] | Tensor, finite: Tensor, what: str) -> None:
    """Refuse examples whose gradients are no numbers, though their losses are.

    Args:
        ids: Of n examples.
        finite: Bool [n].
        what: Which examples these are.

    Raises:
        ValueError: Naming the ids.
    """
    finite = finite.cpu()
    if not bool(finite.all()):
        wild = torch.as_tensor(ids)[~finite].tolist()
        raise ValueError(
            f"the gradient of {len(wild)} of {len(finite)} {what} is not finite, or too large to be squared (ids "
            f"{wild[:8]}). Remove these examples or repair the model."
        )


def omit_nonfinite(
    model: nn.Module,
    data: Any,
    loss: ExampleLoss | Callable[[nn.Module, Any], Tensor] | None = None,
    batch_size: int | None = None,
) -> ExampleLoader:
    """The examples whose loss is finite, for any call that takes data; one forward pass over all of them.

    Ids stay positions in the whole dataset, so that scores and curvatures are labelled as they would be.

    Args:
        model: The model, which is run in evaluation mode.
        data: A map-style dataset, or a DataLoader over one.
        loss: Per-example loss; None resolves it from the model and the first batch.
        batch_size: Examples per batch; None takes the loader's, or 32.

    Returns:
        A loader without the others, which ``omitted`` names. There is a warning with their ids if there are any.

    Raises:
        ValueError: If the data is empty, the model cannot be run on an example (ids are named), or none is left.
    """
    loader = ExampleLoader(data, batch_size)
    device = next(model.parameters()).device
    found: ExampleLoss | None = None
    kept: list[int] = []
    with evaluating(model), torch.no_grad():
        for ids, batch in loader:
            batch = to_device(batch, device)
            found = resolve_loss(model, batch, loss) if found is None else found
            losses = run_batch(partial(found.losses, model), batch, ids, loader.what)
            kept += ids[torch.isfinite(losses).cpu()].tolist()
    omitted = sorted(set(loader.ids) - set(kept))
    if not kept:
        raise ValueError(
            f"`omit_nonfinite(data)`: the loss of none of {loader.num_examples} examples is finite; repair the model."
        )
    if omitted:
        warnings.warn(
            f"{len(omitted)} of {loader.num_examples} examples are left out because their loss is not finite (ids "
            f"{omitted[:8]}{', ...' if len(omitted) > 8 else ''}).",
            stacklevel=3,
        )
    return ExampleLoader(loader, indices=kept, omitted=(*loader.omitted, *omitted))
