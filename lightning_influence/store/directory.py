"""The directory of a recording: its manifest, and files that count only once the manifest lists them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_influence.errors import StoreError
from lightning_influence.store import files

MANIFEST = "manifest.json"
GROUPS = ("curvature", "rows", "scores", "json")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Directory:
    """Named entries in groups, each with its files.

    Nothing is kept in memory: the manifest is read from disk for every question and for every change, so
    that several objects may take turns on one directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it is on disk now.

        Raises:
            StoreError: If there is none or it cannot be read.
        """
        try:
            content: dict[str, Any] = files.read_json(self.path / MANIFEST)
        except FileNotFoundError:
            raise StoreError(f"{self.path} has no {MANIFEST}. Expected the directory of a recording.") from None
        except ValueError as error:
            raise StoreError(f"{self.path / MANIFEST} is damaged: {error}. Restore it, or record again.") from None
        if not isinstance(content, dict):
            raise StoreError(f"{self.path / MANIFEST} is damaged: it is no mapping. Restore it, or record again.")
        return content

    def begin(self, head: dict[str, Any]) -> None:
        """Write a manifest without entries."""
        files.write_json(self.path / MANIFEST, {**head, "files": {}, **{group: {} for group in GROUPS}})

    def entry(self, group: str, name: str) -> dict[str, Any]:
        """What the manifest says of one entry; ``files`` lists its paths in order.

        Raises:
            StoreError: If there is no such entry.
        """
        entries = self.manifest[group]
        if name not in entries:
            raise StoreError(f"{self.path} has no {group} {name!r}. Expected one of {sorted(entries)}.")
        entry: dict[str, Any] = entries[name]
        return entry

    def checked(self, path: str) -> Path:
        """Where a listed file is, once it has been found to be what was written.

        Raises:
            StoreError: If it is missing or has changed.
        """
        return files.check_file(self.path / path, self.manifest["files"][path]["sha256"])

    def commit(self, group: str, name: str, entry: dict[str, Any], written: Iterable[str]) -> None:
        """List files, after they were written, besides those that the entry has already."""
        content = self.manifest
        written = list(written)
        before = content[group].get(name, {}).get("files", [])
        content[group][name] = {**entry, "files": sorted({*before, *written})}
        for path in written:
            size = (self.path / path).stat().st_size
            content["files"][path] = {"sha256": files.checksum(self.path / path), "bytes": size}
        files.write_json(self.path / MANIFEST, content)

    def make_room(self, group: str, name: str) -> None:
        """Strike out what is about to be replaced: a kill in between leaves it missing, never wrong.

        Raises:
            ValueError: If the name cannot be the name of a file.
        """
        if not NAME.fullmatch(name) or f"{name}.json" == MANIFEST:
            raise ValueError(
                f"`{name!r}` as a name in a store: expected letters, digits, '.', '_' and '-', "
                "the first one a letter or digit, and not 'manifest'."
            )
        content = self.manifest
        entry = content[group].pop(name, None)
        if entry is not None:
            for path in entry["files"]:
                del content["files"][path]
            files.write_json(self.path / MANIFEST, content)
            for path in entry["files"]:
                (self.path / path).unlink(missing_ok=True)
