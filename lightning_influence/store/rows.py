"""Per-example rows that are written as they come, and taken up again where a killed run stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_influence.errors import StoreError
from lightning_influence.store import files
from lightning_influence.store.directory import Directory
from lightning_influence.store.ids import Id


@dataclass(frozen=True)
class Rows:
    """Some rows of a table.

    Attributes:
        ids: The ``n`` ids of the examples.
        values: By column (a component, say), ``[n, ...]``.
    """

    ids: tuple[Id, ...]
    values: dict[str, Tensor]


class RowTable:
    """Per-example rows in shards: which row goes where is settled by the list of ids when the table begins."""

    def __init__(self, directory: Directory, name: str) -> None:
        self.directory = directory
        self.name = name

    @property
    def exists(self) -> bool:
        """Whether the table was begun."""
        return self.name in self.directory.manifest["rows"]

    @property
    def entry(self) -> dict[str, Any]:
        """num_rows, shard_rows, columns (None before the first shard), settings, files."""
        return self.directory.entry("rows", self.name)

    @property
    def ids(self) -> tuple[Id, ...]:
        """All ids, in stored order."""
        self.directory.entry("rows", self.name)
        return tuple(files.read_json(self.directory.checked(self._ids_path)))

    @property
    def done(self) -> list[int]:
        """Indices of the shards that are on disk."""
        paths = [Path(path) for path in self.entry["files"] if path.endswith(".safetensors")]
        return [int(path.stem) for path in paths if (self.directory.path / path).is_file()]

    def begin(self, ids: tuple[Id, ...], shard_rows: int, settings: Mapping[str, Any]) -> None:
        """Settle the ids, their place, and how the rows are made."""
        self.directory.make_room("rows", self.name)
        files.write_json(self.directory.path / self._ids_path, list(ids))
        entry = {"num_rows": len(ids), "shard_rows": shard_rows, "columns": None, "settings": dict(settings)}
        self.directory.commit("rows", self.name, entry, [self._ids_path])

    def plan_differences(self, ids: tuple[Id, ...], shard_rows: int, settings: Mapping[str, Any]) -> Iterator[str]:
        """One line for each way in which the stored plan is another one."""
        stored = self.ids
        if stored != ids:
            left, right = set(stored), set(ids)
            extra, lacking = [i for i in stored if i not in right], [i for i in ids if i not in left]
            yield (
                f"ids of rows {self.name!r}: {len(extra)} only in the store {extra[:5]}, {len(lacking)} only "
                f"asked for {lacking[:5]}{'' if extra or lacking else ', but in another order'}"
            )
        if self.entry["shard_rows"] != shard_rows:
            yield f"shard_rows of rows {self.name!r}: stored {self.entry['shard_rows']}, asked {shard_rows}"
        known = self.entry.get("settings", {})
        for key in sorted({*known, *settings}):
            if known.get(key) != settings.get(key):
                yield f"{key} of rows {self.name!r}: stored {known.get(key)!r}, asked {settings.get(key)!r}"

    def stored_ids(self) -> set[Id]:
        """Ids whose rows are on disk; none when there is no table."""
        if not self.exists:
            return set()
        step, done = self.entry["shard_rows"], set(self.done)
        return {id_ for at, id_ in enumerate(self.ids) if at // step in done}

    def commit(self, shard: int, values: dict[str, Tensor]) -> None:
        """Keep one complete shard, ``[rows, ...]`` by column."""
        path = self._shard_path(shard)
        files.write_tensors(self.directory.path / path, values)
        entry = {**self.entry, "columns": row_format(values)}
        self.directory.commit("rows", self.name, entry, [path])

    def read(self) -> Iterator[Rows]:
        """All rows, shard by shard.

        Raises:
            StoreError: If rows are missing or a file is damaged.
        """
        ids, step = self.ids, self.entry["shard_rows"]
        there = self.stored_ids()
        missing = [id_ for id_ in ids if id_ not in there]
        if missing:
            raise StoreError(
                f"{self.directory.path}: rows {self.name!r} lack {len(missing)} of {len(ids)} ids, the first "
                f"{missing[:5]}. Go on with `row_writer({self.name!r}, ids)`."
            )
        for start in range(0, len(ids), step):
            path = self.directory.checked(self._shard_path(start // step))
            yield Rows(ids[start : start + step], load_file(path))

    @property
    def _ids_path(self) -> str:
        return f"rows/{self.name}/ids.json"

    def _shard_path(self, shard: int) -> str:
        return f"rows/{self.name}/{shard:05}.safetensors"


class RowWriter:
    """Collects the rows of a table and writes each shard when all of it is there.

    Where a row goes does not depend on when it comes: a run that was killed and resumed ends with the same
    bytes as one that was not. A kill, or an end before all rows are there, costs at most the shards that are
    begun and not complete. Made by `Store.row_writer`.
    """

    def __init__(self, table: RowTable) -> None:
        self._table = table
        self._ids = table.ids
        self._shard_rows: int = table.entry["shard_rows"]
        self._columns: dict[str, Any] | None = table.entry["columns"]
        self._done = set(table.done)
        self._position = {id_: position for position, id_ in enumerate(self._ids)}
        self._begun: dict[int, dict[Id, dict[str, Tensor]]] = {}

    @property
    def missing_ids(self) -> tuple[Id, ...]:
        """Ids that a run started now would have to compute, in stored order."""
        return tuple(id_ for id_, at in self._position.items() if at // self._shard_rows not in self._done)

    def write(self, ids: Iterable[Any], values: Mapping[str, Tensor]) -> None:
        """Add rows. Ids that are there already are passed over: samplers pad with repeated examples.

        Args:
            ids: ``n`` ids, all of them among those of the table.
            values: By column, ``[n, ...]``; the same columns, shapes and dtypes in every call.

        Raises:
            ValueError: If an id is not of this table, or the columns are not those written before.
        """
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        self._check(ids, values)
        own = {column: value.detach().to("cpu", copy=True) for column, value in values.items()}
        for row, id_ in enumerate(ids):
            shard = self._position[id_] // self._shard_rows
            if shard in self._done:
                continue
            begun = self._begun.setdefault(shard, {})
            begun.setdefault(id_, {column: value[row] for column, value in own.items()})
            if len(begun) == len(self._shard_ids(shard)):
                self._finish(shard)

    def _finish(self, shard: int) -> None:
        rows = [self._begun[shard][id_] for id_ in self._shard_ids(shard)]
        self._table.commit(shard, {column: torch.stack([row[column] for row in rows]) for column in rows[0]})
        self._done.add(shard)
        del self._begun[shard]

    def _shard_ids(self, shard: int) -> tuple[Id, ...]:
        return self._ids[shard * self._shard_rows : (shard + 1) * self._shard_rows]

    def _check(self, ids: list[Any], values: Mapping[str, Tensor]) -> None:
        unknown = [id_ for id_ in ids if id_ not in self._position]
        if unknown:
            raise ValueError(f"`write(ids=...)`: expected ids of the table, got {unknown[:5]} besides.")
        lengths = {column: len(value) for column, value in values.items()}
        if not lengths or set(lengths.values()) != {len(ids)}:
            raise ValueError(f"`write(values=...)`: expected {len(ids)} rows by column, one an id, got {lengths}.")
        columns = row_format(values)
        if self._columns is not None and columns != self._columns:
            raise ValueError(
                f"`write(values=...)`: expected the columns written before, {self._columns}, got {columns}."
            )
        self._columns = columns


def row_format(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Shape and dtype of one row by column.

    >>> row_format({"fc": torch.zeros(8, 3, 4)})
    {'fc': {'shape': [3, 4], 'dtype': 'float32'}}
    """
    return {
        column: {"shape": list(value.shape[1:]), "dtype": str(value.dtype).removeprefix("torch.")}
        for column, value in values.items()
    }
