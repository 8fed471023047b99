"""Vectors of a whole pool in one file, from which selection reads without loading it: projected or whitened."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_influence.errors import StoreError
from lightning_influence.store import files

Work: TypeAlias = Callable[[int], Iterator[tuple[Tensor, Tensor]]]  # batches to leave out -> (ids, vectors) of others

DTYPES = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}
ROUNDED = 1e-2  # relative rounding error of a row, above which it is called badly rounded
FLUSH = 64  # batches between two notes of how far a run has come


@dataclass(frozen=True)
class GradientMatrix:
    """One vector for each example, [n, k], in the order of the data; as large on disk as its numbers.

    Attributes:
        path: Of the npy file. ``<path>.json`` beside it tells what the vectors are.
        settings: All that they depend on: fingerprints of model and data, components, projection, loss, labels.
    """

    path: Path
    settings: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> GradientMatrix:
        """A matrix that `ProjectedDot.write` or `InfluenceFunction.write_features` has finished.

        Raises:
            StoreError: If it is not there, or not finished.
        """
        path = Path(path)
        if not path.is_file() or not _notes(path).is_file():
            hint = " A run that was killed goes on when it is started again." if _partial(path).is_file() else ""
            raise StoreError(f"`GradientMatrix.open({str(path)!r})`: there is no finished matrix.{hint}")
        return cls(path, files.read_json(_notes(path))["settings"])

    @property
    def values(self) -> Tensor:
        """[n, k], read from the file where it is looked at; changes to it stay in memory."""
        return torch.from_numpy(np.load(self.path, mmap_mode="c", allow_pickle=False))


def write_matrix(
    path: str | Path, ids: Sequence[int], columns: int, dtype: torch.dtype, settings: Mapping[str, Any], work: Work
) -> GradientMatrix:
    """Fill a matrix batch by batch; one that was killed goes on where it was, and one that is there is returned.

    Args:
        path: Of the npy file.
        ids: Of the n rows, in their order.
        columns: k.
        dtype: Of the file: float16, float32 or float64.
        settings: All that the numbers depend on, in JSON's types.
        work: Called with a number of batches to leave out, gives (ids int64 [b], vectors [b, k]) of the others.

    Raises:
        ValueError: If a number does not fit into the dtype (ids are named), the dtype is none of these, or the path is
            that of a folder.
        StoreError: If the file, or the beginning of it, is of other settings.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise ValueError(f"`write(dtype={dtype})`: expected one of {[str(d) for d in DTYPES]}.")
    if path.is_dir():
        raise ValueError(
            f"`write(path={str(path)!r})`: that is a folder. Expected the path of a file, such as pool.npy."
        )
    asked = files.as_json({**settings, "shape": [len(ids), columns], "dtype": str(dtype)}, "write(settings)")
    for notes in (_notes(path), _notes(_partial(path))):
        if notes.is_file():
            _check_same(path, files.read_json(notes)["settings"], asked)
    if path.is_file() and _notes(path).is_file():
        return GradientMatrix.open(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _fill(path, ids, (columns, dtype), asked, work)
    os.replace(_notes(_partial(path)), _notes(path))
    os.replace(_partial(path), path)
    return GradientMatrix.open(path)


def _fill(
    path: Path, ids: Sequence[int], columns: tuple[int, torch.dtype], settings: dict[str, Any], work: Work
) -> None:
    (k, dtype), places = columns, {name: row for row, name in enumerate(ids)}
    partial, notes = _partial(path), _notes(_partial(path))
    begun = partial.is_file() and notes.is_file()
    state: dict[str, Any] = {"settings": settings, "batches": 0, "rounded": 0}
    if begun:
        state = files.read_json(notes)
    matrix = np.lib.format.open_memmap(
        partial, "r+" if begun else "w+", DTYPES[dtype], None if begun else (len(ids), k)
    )
    if not begun:
        files.write_json(notes, state)
    try:
        for count, (rows, vectors) in enumerate(work(state["batches"]), start=1):
            kept = vectors.to("cpu", dtype)
            try:
                state["rounded"] += _badly_rounded(rows, vectors.cpu(), kept)
            except ValueError:  # no later run could end it, but one of another dtype at this place shall start
                del matrix
                for leftover in (partial, notes):
                    leftover.unlink()
                raise
            matrix[[places[name] for name in rows.tolist()]] = kept.numpy()
            state["batches"] += 1
            if count % FLUSH == 0:
                _keep(matrix, notes, state)
    except Exception:  # of an example that cannot be passed, say: what came before it stays
        if partial.is_file():
            _keep(matrix, notes, state)
        raise
    _keep(matrix, notes, state)
    if state["rounded"]:
        warnings.warn(
            f"{path}: {state['rounded']} of {len(ids)} vectors are too short for {dtype}, which changed them by more "
            f"than {ROUNDED:.0%}. Write unit vectors (normalise=True) or another dtype.",
            stacklevel=4,
        )


def _keep(matrix: np.memmap[Any, Any], notes: Path, state: dict[str, Any]) -> None:
    matrix.flush()
    files.write_json(notes, state)


def _badly_rounded(rows: Tensor, vectors: Tensor, kept: Tensor) -> int:
    """How many vectors changed much; those that do not fit at all are refused."""
    too_long = ~kept.isfinite().all(1)
    if too_long.any():
        raise ValueError(
            f"the vectors of {int(too_long.sum())} examples do not fit into {kept.dtype} (ids "
            f"{rows[too_long][:8].tolist()}, largest number {float(vectors.abs().max()):.3g}). Write unit vectors "
            "(normalise=True) or another dtype."
        )
    error = (vectors - kept.to(vectors.dtype)).norm(dim=1)
    return int((error > ROUNDED * vectors.norm(dim=1)).sum())


def _check_same(path: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    wrong = [key for key in sorted({*stored, *asked}) if stored.get(key) != asked.get(key)]
    if wrong:
        lines = "".join(f"\n- {key}: stored {_short(stored.get(key))}, asked {_short(asked.get(key))}" for key in wrong)
        raise StoreError(f"{path} holds, or has begun with, other vectors:{lines}\nWrite to another path.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _notes(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
