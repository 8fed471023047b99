"""Which examples they were that a model, its loss or a collate function cannot be run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from lightning_influence.capture.batches import batch_size, examples
from lightning_influence.errors import NotFittedError, StoreError, UnsupportedLayerError

Result = TypeVar("Result")

FAILURES = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError)
MOST = 8  # examples that are looked for and named
_OWN = (UnsupportedLayerError, NotFittedError, StoreError)
_DEVICE = ("out of memory", "DefaultCPUAllocator", "CUDA error", "device-side assert")


class UnfitExamplesError(ValueError):
    """Examples that nothing can be computed of; the message tells why.

    Attributes:
        ids: Of the first of them.
    """

    def __init__(self, message: str, ids: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ids = tuple(ids)


def run_batch(run: Callable[[Any], Result], batch: Any, ids: Tensor | None, what: str) -> Result:
    """``run(batch)``; where the batch does not fit, an error that says which of its examples do not.

    Args:
        run: What is computed of a batch, one result for each example.
        batch: Tensors with the examples first.
        ids: Of the examples, int64 [n]; None numbers them.
        what: What to call them in an error.

    Raises:
        UnfitExamplesError: Then. Errors of this package and of the device (its memory, say) pass through as they are.
    """
    try:
        return run(batch)
    except FAILURES as error:
        raise_unfit(error, run, batch, ids, what)


def raise_unfit(error: Exception, run: Callable[[Any], Any], batch: Any, ids: Tensor | None, what: str) -> NoReturn:
    """Raise an error that ``run(batch)`` raised again, with the examples that it is about.

    Further calls find the examples that are to blame, by halves of the batch: about 2 log2(n) calls for one. In each
    the examples are repeated to n, so that what is laid out for n of them, such as random numbers, goes on to fit.
    """
    if isinstance(error, (UnfitExamplesError, *_OWN)) or of_device(error):
        raise error
    names = range(_size(batch)) if ids is None else ids.tolist()
    found = _unfit_rows(run, batch, len(names)) if len(names) > 1 else dict.fromkeys(range(len(names)), error)
    odd, reason = [names[row] for row in found][:MOST], next(iter(found.values()), error)
    few = f"at least {MOST}" if len(found) > MOST else str(len(odd))
    where = f"{few} of {len(names)} {what} (ids {odd})" if odd else f"a batch of {len(names)} {what} ({_some(names)})"
    if isinstance(reason, ValueError):
        raise UnfitExamplesError(f"{reason} Met in {where}.", odd or names) from error
    raise UnfitExamplesError(
        f"the model cannot be run on {where}: {_text(reason)}. Expected inputs and labels as in its training: of the "
        "same shapes, dtypes and keys, tokens within its vocabulary and no more than it takes, labels within its "
        "outputs.",
        odd or names,
    ) from error


def collated(collate: Callable[[list[Any]], Any], rows: list[Any], ids: Sequence[int], what: str) -> Any:
    """``collate(rows)``; where they do not go together, an error that says which are unlike the others.

    Raises:
        UnfitExamplesError: Then.
    """
    try:
        return collate(rows)
    except FAILURES as error:
        if isinstance(error, (UnfitExamplesError, *_OWN)) or of_device(error):
            raise
        odd = [ids[row] for row in _odd_rows(collate, rows)]
        some = f"{len(odd)} of {len(ids)} {what} (ids {odd[:MOST]})" if odd else f"{len(ids)} {what} ({_some(ids)})"
        raise UnfitExamplesError(
            f"{some} do not go into one batch{' with the others' * bool(odd)}: {_text(error)}. Expected {what} of the "
            "same shapes and keys, or a collate_fn that pads them.",
            odd or ids,
        ) from error


def _unfit_rows(run: Callable[[Any], Any], batch: Any, n: int) -> dict[int, Exception]:
    """Rows that fail without the others, one more than are named at the most, with what they fail with."""
    found: dict[int, Exception] = {}
    waiting = [list(range(n // 2, n)), list(range(n // 2))]
    while waiting and len(found) <= MOST:
        rows = waiting.pop()
        error = _failure(run, batch, rows, n)
        if error is None:
            continue
        if len(rows) == 1:
            found[rows[0]] = error
        else:
            half = len(rows) // 2
            waiting += [rows[half:], rows[:half]]
    return found


def _failure(run: Callable[[Any], Any], batch: Any, rows: list[int], n: int) -> Exception | None:
    try:
        part = examples(batch, [rows[k % len(rows)] for k in range(n)])
    except FAILURES:
        return None  # no examples can be told in it
    try:
        run(part)
    except Exception as error:
        return None if of_device(error) else error
    return None


def _odd_rows(collate: Callable[[list[Any]], Any], rows: list[Any]) -> list[int]:
    """Rows that do not go with most of the others, by pairs with the first one; empty where this does not tell."""
    apart = {k: _fails(collate, [rows[0], rows[k]]) for k in range(1, len(rows))}
    odd = [k for k, fails in apart.items() if fails]
    others = [0, *(k for k, fails in apart.items() if not fails)]
    return min(odd, others, key=len) if len(odd) != len(others) else []


def _fails(collate: Callable[[list[Any]], Any], rows: list[Any]) -> bool:
    try:
        collate(rows)
    except Exception:
        return True
    return False


def of_device(error: Exception) -> bool:
    """Whether the device is to blame: its memory, or a kernel that has stopped it."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _DEVICE)


def _size(batch: Any) -> int:
    try:
        return batch_size(batch)
    except ValueError:
        return 0


def _some(names: Sequence[int]) -> str:
    return f"ids {list(names[:MOST])}{', ...' if len(names) > MOST else ''}"


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".")
