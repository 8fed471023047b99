"""A stream of examples as a dataset with positions, for recording from it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset

from lightning_influence.capture.example_digest import example_digest

_WASTE = 5  # rows that were read over, by the length of the stream, before it is told


class StreamedExamples(Dataset[Any]):
    """The rows of a stream, numbered in its order; of each sixteen bytes are kept in memory.

    For an IterableDataset of torch or Hugging Face ``datasets``, which recorders and estimators cannot address::

        GradientDotRecorder(queries, train=StreamedExamples(stream, 10_000))

    Rows asked for in ascending order are read in one go; to go back, the stream is begun anew. So it has to give the
    same rows in the same order every time, which is checked row by row where their values can be told. Recordings,
    factors and scores take a few passes over it. What jumps about, such as batches of examples of one length, is slow
    without ``keep``. Streams are recorded from; `DataSelector` serves them as they are and does not choose from them.

    Args:
        stream: Anything that can be iterated again and again.
        length: Rows from its beginning that are looked at, for endless and for long ones; None for all of them, which
            are counted when first needed.
        keep: Whether rows that were read stay in memory.

    Raises:
        ValueError: If it is an iterator, which can be read once alone, or ``length`` is not an int >= 1; while reading,
            if it has fewer rows than ``length`` or gives others than before (ids are named).
    """

    def __init__(self, stream: Iterable[Any], length: int | None = None, *, keep: bool = False) -> None:
        if not isinstance(stream, Iterable) or isinstance(stream, Iterator):
            raise ValueError(
                f"`StreamedExamples({type(stream).__name__})`: expected something that can be iterated again, such as "
                "an IterableDataset. Of a generator pass what makes it, as `datasets.IterableDataset.from_generator`."
            )
        if length is not None and (type(length) is not int or length < 1):
            raise ValueError(f"`StreamedExamples(length={length!r})`: expected an int >= 1, or None for all rows.")
        self.stream, self.keep = stream, keep
        self._length = length
        self._digests: list[bytes] = []
        self._kept: list[Any] = []
        self._rows: Iterator[Any] = iter(())
        self._place: int | None = None  # of the next row; None where nothing is being read
        self._wasted = 0
        self._told = self._blind = False

    def __len__(self) -> int:
        """Number of rows; the first time, without a length, the stream is read to its end."""
        if self._length is None:
            self._begin()
            while self._next() is not None:
                pass
            self._length = self._place or 0
        return self._length

    def __getitem__(self, k: int) -> Any:
        """One row."""
        return self.__getitems__([k])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[Any]:
        """Rows in the order asked for."""
        found: dict[int, Any] = {}
        for k in sorted(set(ids)):
            if not 0 <= k < len(self):
                raise IndexError(f"StreamedExamples: row {k} of {len(self)}.")
            found[k] = self._kept[k] if k < len(self._kept) else self._read(k)
        return [found[k] for k in ids]

    def _read(self, k: int) -> Any:
        if self._place is None or k < self._place:
            self._begin()
        while True:
            row = self._next()
            if row is None:
                raise ValueError(
                    f"StreamedExamples: {type(self.stream).__name__} ends after {self._place} rows, expected "
                    f"{self._length}. Give that `length`, or a stream that gives the same rows every time."
                )
            if self._place == k + 1:
                return row[0]
            self._waste()

    def _begin(self) -> None:
        self._rows, self._place = iter(self.stream), 0

    def _next(self) -> tuple[Any] | None:
        """The next row in a tuple, as it may be None itself; None at the end."""
        assert self._place is not None
        for row in self._rows:
            digest = example_digest(row) or self._unchecked(row)
            if self._place == len(self._digests):
                self._digests.append(digest)
            elif self._digests[self._place] != digest:
                raise ValueError(
                    f"StreamedExamples: {type(self.stream).__name__} gave another row {self._place} than before. "
                    "Expected the same rows in the same order at every pass: take out shuffling and augmentation, or "
                    "seed them, or pass keep=True."
                )
            if self.keep and self._place == len(self._kept):
                self._kept.append(row)
            self._place += 1
            return (row,)
        return None

    def _unchecked(self, row: Any) -> bytes:
        """Tell once that a row cannot be compared with itself."""
        if not self._blind:
            self._blind = True
            warnings.warn(
                f"StreamedExamples: {type(self.stream).__name__} gives rows ({type(row).__name__}) that hold more than "
                "tensors, arrays, images, strings and numbers; whether it gives the same ones at every pass cannot be "
                "checked. Make sure that it does, or pass keep=True.",
                stacklevel=4,
            )
        return b""

    def _waste(self) -> None:
        """Tell once that rows are asked for in an order that a stream is bad at."""
        self._wasted += 1
        if not self._told and self._wasted > _WASTE * len(self):
            self._told = True
            warnings.warn(
                f"StreamedExamples: rows of {type(self.stream).__name__} are asked for out of order, and it is read "
                "again and again. Pass keep=True if its rows fit into memory.",
                stacklevel=4,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without the place in the stream, which cannot be copied to another process."""
        return self.__dict__ | {"_rows": iter(()), "_place": None}
