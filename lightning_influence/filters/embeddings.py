"""Rows as vectors, by the user's own embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.filters.words import some

Array = NDArray[Any]  # float32 or float64
Embed = Callable[[list[Any]], Any]

CHUNK = 2**20  # numbers that are in float64 at once: 8 MiB
_LARGEST = 1e37  # a norm whose products still fit float32


def embedding_function(embed: Any) -> Embed | None:
    """What turns a list of rows into embeddings: ``embed.encode`` where there is one, otherwise ``embed``.

    A model of sentence-transformers is a module, and can be called too, but not with a list of rows.

    Raises:
        ValueError: If it is neither.
    """
    if embed is None:
        return None
    found = getattr(embed, "encode", embed)
    if isinstance(embed, str) or not callable(found):  # strings have an `encode` too
        raise ValueError(
            f"`KNNFilter(embed=...)`: expected a function of a list of rows, or an object with a method `encode`, "
            f"got {type(embed).__name__}. Precomputed embeddings are passed as the corpus: `KNNFilter(embeddings)`."
        )
    function: Embed = found
    return function


def embedded(
    call: str, items: Any, embed: Embed | None, batch_size: int, progress: bool
) -> tuple[Array, NDArray[np.float64]]:
    """Embeddings ``[m, d]`` and their Euclidean norms ``[m]`` (float64).

    Half precision becomes float32, and everything that is neither becomes float64.

    Args:
        call: Of the user's, for the errors.
        items: ``m`` rows, or their embeddings when there is no ``embed``.
        embed: As `embedding_function` gives it.
        batch_size: Rows in a call of ``embed``.
        progress: Whether more than three seconds show a progress bar.

    Raises:
        ValueError: If embeddings are not numbers in the shape ``[m, d]``, not finite, or differ in width.
    """
    if embed is None:
        rows = as_matrix(call, items, first=0, expected=len(items))
        return rows, finite_norms(call, rows)
    parts: list[Array] = []
    norms: list[NDArray[np.float64]] = []
    for first in tqdm(range(0, len(items), batch_size), desc="embedding", delay=3, leave=False, disable=not progress):
        batch = [items[k] for k in range(first, min(first + batch_size, len(items)))]
        with torch.no_grad():
            rows = as_matrix(call, embed(batch), first, len(batch))
        if parts and rows.shape[1] != parts[0].shape[1]:
            raise ValueError(
                f"`{call}`: expected embeddings of one width, got {parts[0].shape[1]} for row 0 and "
                f"{rows.shape[1]} for row {first}."
            )
        parts.append(rows)
        norms.append(finite_norms(call, rows, first))
    return np.concatenate(parts), np.concatenate(norms)


def as_matrix(call: str, values: Any, first: int, expected: int) -> Array:
    """One batch of embeddings as an array ``[expected, d]``, rows contiguous.

    Args:
        call: Of the user's, for the errors.
        values: Array, tensor on any device, or a list of them.
        first: Position of its first row, for the errors.
        expected: Its number of rows.

    Raises:
        ValueError: If it has another shape, or does not hold numbers.
    """
    if isinstance(values, list | tuple):
        values = [_array(value) for value in values]
    try:
        rows = np.asarray(_array(values))
    except ValueError:  # of lists of different lengths
        rows = np.empty(0, dtype=object)
    if rows.dtype.kind not in "fiu" or rows.ndim != 2 or len(rows) != expected or rows.shape[1] == 0:
        raise ValueError(
            f"`{call}`: expected numbers [{expected}, d], one embedding for each of the rows {first} to "
            f"{first + expected - 1}, got {rows.dtype} {list(rows.shape)}. Texts need an `embed`."
        )
    if rows.dtype == np.float16:
        rows = rows.astype(np.float32)
    return np.ascontiguousarray(rows, dtype=rows.dtype if rows.dtype in (np.float32, np.float64) else np.float64)


def _array(value: Any) -> Any:
    """A tensor as an array, half precision as float32; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype in {torch.float16, torch.bfloat16} else value).numpy()


def finite_norms(call: str, rows: Array, first: int = 0) -> NDArray[np.float64]:
    """Euclidean norms, ``[m]``, accumulated in float64.

    Raises:
        ValueError: If a norm is not finite or too large, naming the rows.
    """
    norms = np.empty(len(rows))
    step = max(1, CHUNK // rows.shape[1])
    for k in range(0, len(rows), step):
        part = rows[k : k + step].astype(np.float64)
        norms[k : k + step] = np.sqrt((part**2).sum(axis=1))
    bad = (first + np.flatnonzero(~(norms < _LARGEST))).tolist()
    if bad:
        raise ValueError(
            f"`{call}`: expected finite embeddings of norms below {_LARGEST:g}, not so {some('row', bad)}."
        )
    return norms
