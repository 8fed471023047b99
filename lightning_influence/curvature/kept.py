"""Records of one pass that serve the next one too, within budgets of memory and disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_influence.capture import LayerRecord
from lightning_influence.capture.budget import check_bytes
from lightning_influence.capture.layers.base import REMEMBERED


class KeptRecords:
    """Whole batches, first come, first kept: in memory until its budget is used up, in temporary files then.

    A context manager, at the end of which the files are gone.

    Args:
        memory_budget: Bytes of the tensors that are kept where they are, on whatever device.
        disk_budget: Bytes of the tensors that are kept in files.
        scratch: Folder in which those get one of their own; None takes the system's for temporary files.

    Raises:
        ValueError: If a budget is none, or there is less room for files than that.
    """

    def __init__(self, memory_budget: int, disk_budget: int = 0, scratch: str | os.PathLike[str] | None = None) -> None:
        check_bytes("fit", "memory_budget", memory_budget)
        check_bytes("fit", "disk_budget", disk_budget)
        self.memory = MemoryRecords(memory_budget)
        self.files = FileRecords(disk_budget, None if not disk_budget else _folder(disk_budget, scratch))

    @property
    def ids(self) -> set[int]:
        """Of the examples that are kept."""
        return self.memory.ids | self.files.ids

    def __enter__(self) -> KeptRecords:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the files."""
        if self.files.folder is not None:
            shutil.rmtree(self.files.folder, ignore_errors=True)

    def __iter__(self) -> Iterator[Iterable[LayerRecord]]:
        """The records of each batch, those in files read one at a time."""
        yield from self.memory
        yield from self.files

    def keeping(self, records: Iterable[LayerRecord]) -> Iterator[LayerRecord]:
        """The records of a batch, kept once the last of them is through, if they fit."""
        place = next((place for place in (self.memory, self.files) if place.left > 0), None)
        return iter(records) if place is None else place.keeping(records)


class Place(ABC):
    """Somewhere to keep batches.

    Attributes:
        left: Bytes that may still be kept; 0 as soon as a batch did not fit, since the next ones are about alike.
        batches: The records of each batch that is kept, in the form they have here.
        ids: Of their examples.
    """

    def __init__(self, budget: int) -> None:
        self.left = budget
        self.batches: list[list[LayerRecord]] = []
        self.ids: set[int] = set()

    def keeping(self, records: Iterable[LayerRecord]) -> Iterator[LayerRecord]:
        """The records of a batch, kept once the last of them is through, if they fit."""
        batch: list[LayerRecord] = []
        used, add = 0, self._adding()
        for record in records:
            yield record
            if used <= self.left:
                kept, used = add(record)
                batch.append(kept)
        if used > self.left or not batch:
            self.left = 0
            self._drop()
            return
        self.batches.append(batch)
        self.ids |= set(batch[0].ids.tolist())
        self.left -= used

    @abstractmethod
    def __iter__(self) -> Iterator[Iterable[LayerRecord]]:
        """The records of each batch."""

    @abstractmethod
    def _adding(self) -> Callable[[LayerRecord], tuple[LayerRecord, int]]:
        """For a new batch: what keeps a record, and tells the bytes of the batch so far."""

    @abstractmethod
    def _drop(self) -> None:
        """Undo what was done for a batch that does not fit."""


class MemoryRecords(Place):
    """As they are."""

    def __iter__(self) -> Iterator[Iterable[LayerRecord]]:
        """The very same records."""
        return iter(self.batches)

    def _drop(self) -> None:
        """Nothing to be done."""

    def _adding(self) -> Callable[[LayerRecord], tuple[LayerRecord, int]]:
        sizes: dict[int, int] = {}

        def add(record: LayerRecord) -> tuple[LayerRecord, int]:
            # Layers share inputs, and a tensor that is a part of another keeps all of it alive.
            for tensor in _tensors(record):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return record, sum(sizes.values())

        return add


@dataclass(frozen=True)
class Filed:
    """Where a tensor is; stands in a record in its place."""

    path: Path
    device: str

    name: ClassVar[str] = "tensor"

    @classmethod
    def write(cls, tensor: Tensor, path: Path) -> Filed:
        """Write it to a new file."""
        save_file({cls.name: tensor.cpu().contiguous()}, path)
        return cls(path, str(tensor.device))

    def read(self) -> Tensor:
        """The tensor on its device, in memory of its own: with the alignment of a file, products round differently."""
        return load_file(self.path)[self.name].to(self.device, copy=True)


class FileRecords(Place):
    """Floating-point tensors in files, one for each; what is small, ids and masks, in memory.

    Args:
        budget: Bytes.
        folder: An empty one; None where there is no budget.
    """

    def __init__(self, budget: int, folder: Path | None) -> None:
        super().__init__(budget)
        self.folder = folder

    def __iter__(self) -> Iterator[Iterable[LayerRecord]]:
        """Records that share an input share it again, if they come soon after one another."""
        for batch in self.batches:
            yield self._read(batch)

    def _read(self, batch: Iterable[LayerRecord]) -> Iterator[LayerRecord]:
        recent: deque[tuple[Filed, Tensor]] = deque(maxlen=REMEMBERED)

        def back(value: Any) -> Any:
            if not isinstance(value, Filed):
                return value
            known = next((tensor for filed, tensor in recent if filed is value), None)
            if known is None:
                known = value.read()
                recent.append((value, known))
            return known

        for record in batch:
            yield _swapped(record, back)

    def _adding(self) -> Callable[[LayerRecord], tuple[LayerRecord, int]]:
        recent: deque[tuple[Tensor, Filed]] = deque(maxlen=REMEMBERED)
        used, count = 0, 0

        def out(value: Any) -> Any:
            nonlocal used, count
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                return value
            known = next((filed for tensor, filed in recent if tensor is value), None)
            if known is None:
                assert self.folder is not None
                known = Filed.write(value, self.folder / f"{len(self.batches)}-{count}.safetensors")
                recent.append((value, known))
                used, count = used + value.nbytes, count + 1
            return known

        return lambda record: (_swapped(record, out), used)

    def _drop(self) -> None:
        assert self.folder is not None
        for path in self.folder.glob(f"{len(self.batches)}-*.safetensors"):
            path.unlink()


def _swapped(record: LayerRecord, swap: Callable[[Any], Any]) -> LayerRecord:
    """The record with every value of it, and of its parts, handed through ``swap``."""
    found: dict[str, Any] = {}
    for field in fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        found[field.name] = tuple(_swapped(v, swap) for v in value) if isinstance(value, tuple) else swap(value)
    return replace(record, **found)  # type: ignore[type-var]


def _tensors(record: LayerRecord) -> list[Tensor]:
    found: list[Tensor] = []

    def note(value: Any) -> Any:
        if isinstance(value, Tensor):
            found.append(value)
        return value

    _swapped(record, note)
    return found


def _folder(budget: int, scratch: str | os.PathLike[str] | None) -> Path:
    parent = Path(tempfile.gettempdir() if scratch is None else scratch)
    if not parent.is_dir():
        raise ValueError(f"`fit(scratch={str(scratch)!r})`: expected a folder for temporary files that exists.")
    free = shutil.disk_usage(parent).free
    if free < budget:
        raise ValueError(
            f"`fit(disk_budget={budget})`: {parent} has {free:,} bytes left. Expected a smaller budget, or another "
            "folder as scratch."
        )
    return Path(tempfile.mkdtemp(prefix="lightning_influence-", dir=parent))
