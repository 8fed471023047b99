"""Whether every query can be recorded, told before training and not after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_influence.callbacks.recording import Recording
from lightning_influence.capture.batches import examples as cut
from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.capture.losses import ExampleLoss
from lightning_influence.capture.losses.batch import is_shared
from lightning_influence.capture.unfit import run_batch


def check_finite(recording: Recording, queries: ExampleLoader, loss: ExampleLoss) -> None:
    """Refuse queries whose loss is not a finite number, by one forward pass over them.

    Raises:
        ValueError: Naming their ids.
    """
    bad: list[int] = []
    with recording.progress(len(queries)) as advance:
        for ids, batch in queries:
            losses = run_batch(partial(loss.losses, recording.model), batch, ids, queries.what)
            if not isinstance(losses, Tensor) or losses.shape != ids.shape:
                return  # not one for each example, of which the capture tells
            wrong = ~losses.detach().isfinite().cpu()
            if wrong.any() and is_shared(losses):  # one number for the batch: look at each example alone
                rows = range(len(ids))
                alone = [loss.losses(recording.model, cut(batch, slice(k, k + 1))).detach().cpu() for k in rows]
                wrong = ~torch.cat(alone).isfinite()
            bad += ids[wrong].tolist()
            advance(1)
    if bad:
        raise ValueError(
            f"the loss of {len(bad)} of {queries.num_examples} queries is not finite (ids {bad[:8]}); expected finite "
            "losses. Remove these queries, or check their inputs and labels."
        )


def texts_of(examples: ExampleLoader, text: str | Callable[..., str], call: str) -> list[str]:
    """The text of every example.

    Args:
        examples: Whose dataset is read.
        text: A field of the dataset's rows, or a function of a row.
        call: How the caller's code reads, for the error text.

    Raises:
        ValueError: If a row has no such field, or what is there is no text.
    """
    rows = ((k, examples.dataset[k]) for k in examples.ids)
    return [_text(k, row, text, call) for k, row in rows]


def _text(k: int, row: Any, text: str | Callable[..., str], call: str) -> str:
    try:
        found = row[text] if isinstance(text, str) else text(row)
    except (LookupError, TypeError, AttributeError) as error:
        fields = f"has the fields {list(row)[:12]}" if isinstance(row, Mapping) else f"is a {type(row).__name__}"
        raise ValueError(
            f"`{call}`: expected a field of the rows or a function of a row; row {k} {fields} "
            f"({type(error).__name__}: {error})."
        ) from error
    if not isinstance(found, str):
        raise ValueError(f"`{call}`: expected a text for every row; for row {k} got a {type(found).__name__}.")
    return found
