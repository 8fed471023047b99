"""One directory on disk for one recording: what was fitted, scored and chosen, and for which model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_influence.capture.component import Component
from lightning_influence.curvature import CURVATURES, Curvature
from lightning_influence.errors import NotFittedError, StoreError
from lightning_influence.store import files, manifest
from lightning_influence.store.directory import GROUPS, MANIFEST, Directory
from lightning_influence.store.files import StoredDtype
from lightning_influence.store.fingerprint import model_fingerprint
from lightning_influence.store.ids import Id, plain_ids
from lightning_influence.store.rows import Rows, RowTable, RowWriter
from lightning_influence.store.scores import StoredScores, check_scores, read_parquet, write_parquet

MAX_SHARD_BYTES = 1 << 29


class Store:
    """A recording on disk, reloadable by a process that never saw the training run.

    Layout::

        manifest.json                        what is here, for which model, with checksums; always written last
        factors/<name>/00000.safetensors     curvature
        rows/<name>/00000.safetensors        per-example rows (gradients, or scores on their way), resumable
        scores/<name>.parquet                component | null, query_id, train_id, score
        <name>.json                          selections and reports

    A file appears whole or not at all, and only what the manifest lists counts: a run may be killed at any
    point. Every file is compared with its checksum when it is read. Nothing is kept in memory, so several
    objects may take turns on one directory; at any one time, one process writes (rank 0, say).

    Begun with `create`, found again with `open`, or either with `resume`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._directory = Directory(path)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | Path, model: nn.Module, components: Iterable[Component], **settings: Any) -> Store:
        """Begin a recording.

        Args:
            path: A directory, made if it is not there.
            model: The model whose gradients are recorded, at the weights in question.
            components: Its components, from `find_components`.
            **settings: Whatever must agree for the recording to be of use (dtype, reduction, seed, formula),
                as plain JSON. `verify` compares them.

        Raises:
            StoreError: If there is a recording already.
            ValueError: If a setting is not plain JSON.
        """
        store = cls(path)
        if (store.path / MANIFEST).exists():
            raise StoreError(
                f"`Store.create({str(path)!r})`: there is a recording already. Expected another directory; "
                "use Store.resume to go on with this one."
            )
        head = {
            "format_version": manifest.FORMAT_VERSION,
            "packages": manifest.package_versions(),
            "model": model_fingerprint(model),
            "components": [manifest.component_to_json(component) for component in components],
            "settings": files.as_json(settings, "Store.create(**settings)"),
        }
        store._directory.begin(head)
        return store

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a recording.

        Raises:
            StoreError: If there is none, it is damaged, or it was written in another format.
        """
        store = cls(path)
        version = store.manifest.get("format_version")
        if version != manifest.FORMAT_VERSION:
            raise StoreError(
                f"`Store.open({str(path)!r})`: expected format version {manifest.FORMAT_VERSION}, found {version}, "
                f"written by {store.manifest.get('packages')}. Read it with that version, or record again."
            )
        lacking = [key for key in ("model", "components", "settings", "files", *GROUPS) if key not in store.manifest]
        if lacking:
            raise StoreError(f"{store.path / MANIFEST} is damaged: it lacks {lacking}. Restore it, or record again.")
        return store

    @classmethod
    def resume(cls, path: str | Path, model: nn.Module, components: Sequence[Component], **settings: Any) -> Store:
        """Open the recording when there is one that fits, begin it when there is none.

        Raises:
            StoreError: If there is one that does not fit; see `verify`.
        """
        if not (Path(path) / MANIFEST).exists():
            return cls.create(path, model, components, **settings)
        store = cls.open(path)
        store.verify(model, components, **settings)
        return store

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it is on disk now.

        Raises:
            StoreError: If there is none or it cannot be read.
        """
        return self._directory.manifest

    @property
    def components(self) -> list[Component]:
        """The components of the recorded model."""
        return [manifest.component_from_json(value) for value in self.manifest["components"]]

    @property
    def settings(self) -> dict[str, Any]:
        """What was handed to `create`, as JSON."""
        return dict(self.manifest["settings"])

    @property
    def contents(self) -> dict[str, list[str]]:
        """Names of what can be read, by kind: curvature, rows, scores, json."""
        content = self.manifest
        return {group: sorted(content[group]) for group in GROUPS}

    def verify(
        self,
        model: nn.Module | None = None,
        components: Iterable[Component] | None = None,
        **settings: Any,
    ) -> None:
        """Refuse a store of another model, other components or settings; what is None is not compared.

        Raises:
            StoreError: Naming every difference.
        """
        found: list[str] = []
        if model is not None:
            found += manifest.fingerprint_differences(self.manifest["model"], model_fingerprint(model))
        if components is not None:
            found += manifest.component_differences(self.components, components)
        asked = files.as_json(settings, "Store.verify(**settings)")
        self._refuse([*found, *manifest.setting_differences(self.settings, asked)])

    def write_curvature(
        self,
        name: str,
        curvature: Curvature,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        dtype: StoredDtype | None = None,
        **meta: Any,
    ) -> None:
        """Keep a fitted curvature.

        Args:
            name: Under which `read_curvature` finds it; an earlier one of that name is replaced.
            curvature: Fitted, on components of this store, of a class in ``CURVATURES``.
            max_shard_bytes: Size of one file; a larger tensor gets a file of its own.
            dtype: ``"bfloat16"`` takes half the room of float32, for 3 digits of every number; `read_curvature` gives
                back the dtype that was fitted. None keeps all digits.
            **meta: Anything worth knowing, as plain JSON: number of examples, dataset, ...

        Raises:
            NotFittedError: If it has not seen its data.
            StoreError: If its components are not those of the store.
            ValueError: If its class is not in ``CURVATURES``, or the dtype is none to store in.
        """
        kind = self._readable_kind(name, curvature)
        fitted = [component.name for component in curvature.components]
        stored = [component for component in self.components if component.name in fitted]
        self._refuse(manifest.component_differences(stored, curvature.components))
        state, dtypes = files.narrowed(curvature.state(), dtype, f"write_curvature({name!r})")
        made = {"class": kind, "settings": curvature.settings(), "dtype": dtypes, "omitted": curvature.omitted}
        entry = {**made, "components": fitted, "meta": meta}
        entry = files.as_json(entry, f"write_curvature({name!r})")
        self._directory.make_room("curvature", name)
        paths = []
        for index, piece in enumerate(files.shards(state, max_shard_bytes)):
            paths.append(f"factors/{name}/{index:05}.safetensors")
            files.write_tensors(self.path / paths[-1], piece)
        self._directory.commit("curvature", name, entry, paths)

    def read_curvature(
        self, name: str, components: Iterable[Component] | None = None, device: str = "cpu"
    ) -> Curvature:
        """A curvature as it was fitted.

        Args:
            name: As written.
            components: Those of the model at hand, to be compared; None takes the stored ones.
            device: Where its tensors go.

        Raises:
            StoreError: If there is none of that name, a file is damaged, or the components differ.
        """
        entry = self._directory.entry("curvature", name)
        if entry["class"] not in CURVATURES:
            raise StoreError(
                f"{self}: curvature {name!r} is a {entry['class']}, expected one of {sorted(CURVATURES)}. "
                "Add the class to lightning_influence.curvature.CURVATURES before reading."
            )
        by_name = {component.name: component for component in self.components}
        stored = [by_name[fitted] for fitted in entry["components"]]
        if components is not None:
            self._refuse(manifest.component_differences(stored, components))
        curvature = self._unfitted(name, entry)
        state: dict[str, Tensor] = {}
        for path in entry["files"]:
            state |= load_file(self._directory.checked(path), device=device)
        curvature.load_state(stored, files.widened(state, entry.get("dtype"), f"{self}: curvature {name!r}"))
        curvature.omitted = tuple(entry.get("omitted", ()))
        return curvature

    def write_scores(
        self,
        name: str,
        values: Tensor,
        query_ids: Iterable[Any],
        train_ids: Iterable[Any],
        components: Iterable[str] | None = None,
        **meta: Any,
    ) -> None:
        """Keep scores as a table that any parquet reader opens.

        Args:
            name: Under which `read_scores` finds them; earlier ones of that name are replaced.
            values: ``[q, n]``, or ``[c, q, n]`` with components.
            query_ids: ``q`` ints or strings, each once; they keep their type.
            train_ids: ``n`` likewise.
            components: ``c`` names.
            **meta: Formula, reduction, damping, checkpoint, ..., as plain JSON.

        Raises:
            ValueError: If the values do not fit their labels.
        """
        what = f"write_scores({name!r})"
        scores = StoredScores(
            values=values,
            query_ids=plain_ids(query_ids, f"write_scores({name!r}, query_ids=...)"),
            train_ids=plain_ids(train_ids, f"write_scores({name!r}, train_ids=...)"),
            components=None if components is None else tuple(components),
            meta=files.as_json(meta, what),
        )
        check_scores(scores, what)
        self._directory.make_room("scores", name)
        path = f"scores/{name}.parquet"
        files.replace_file(self.path / path, lambda partial: write_parquet(partial, scores))
        self._directory.commit("scores", name, {"shape": list(values.shape), "meta": scores.meta}, [path])

    def read_scores(self, name: str) -> StoredScores:
        """Scores as they were written.

        Raises:
            StoreError: If there are none of that name, or the file is damaged.
        """
        return read_parquet(self._only_file("scores", name))

    def write_json(self, name: str, value: Any) -> None:
        """Keep plain JSON, a selection say, as ``<name>.json``; an earlier one is replaced.

        Raises:
            ValueError: If the value is not plain JSON.
        """
        value = files.as_json(value, f"write_json({name!r})")
        self._directory.make_room("json", name)
        files.write_json(self.path / f"{name}.json", value)
        self._directory.commit("json", name, {}, [f"{name}.json"])

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote: tuples come back as lists, keys as strings.

        Raises:
            StoreError: If there is none of that name, or the file is damaged.
        """
        return files.read_json(self._only_file("json", name))

    def row_writer(
        self, name: str, ids: Iterable[Any], shard_rows: int = 1024, settings: Mapping[str, Any] | None = None
    ) -> RowWriter:
        """Begin a table of per-example rows, or take it up where a killed run stopped.

        Hand the writer rows of `RowWriter.missing_ids` until there are none. Where the numbers depend on how
        examples are batched, let ``shard_rows`` be a multiple of the batch size: then the batches of a
        resumed run are those of an uninterrupted one.

        Args:
            name: Under which `read_rows` finds it.
            ids: All ids of the table, ints or strings, each once, in the order in which they are stored.
            shard_rows: Rows in one file, which is what a kill can cost.
            settings: What else the numbers depend on, in JSON's types.

        Raises:
            StoreError: If the table was begun with other ids, settings or another ``shard_rows``.
        """
        plain = plain_ids(ids, f"row_writer({name!r}, ids=...)")
        if shard_rows < 1:
            raise ValueError(f"`row_writer({name!r}, shard_rows={shard_rows})`: expected an int >= 1.")
        table = RowTable(self._directory, name)
        if table.exists:
            self._refuse(table.plan_differences(plain, shard_rows, settings or {}))
        else:
            table.begin(plain, shard_rows, settings or {})
        return RowWriter(table)

    def missing_ids(self, name: str, ids: Iterable[Any]) -> tuple[Id, ...]:
        """Those of the ids whose rows are not on disk, in the given order; all when there is no such table."""
        there = RowTable(self._directory, name).stored_ids()
        return tuple(id_ for id_ in plain_ids(ids, f"missing_ids({name!r}, ids=...)") if id_ not in there)

    def read_rows(self, name: str) -> Iterator[Rows]:
        """The rows of a complete table, file by file, in the order of its ids.

        Raises:
            StoreError: If there is no such table, rows are missing, or a file is damaged.
        """
        return RowTable(self._directory, name).read()

    def _unfitted(self, name: str, entry: Mapping[str, Any]) -> Curvature:
        try:
            return CURVATURES[entry["class"]](**entry["settings"])
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"{self}: curvature {name!r} has settings that this version does not know ({error}); written by "
                f"{self.manifest.get('packages')}. Read it with that version, or record again."
            ) from None

    def _readable_kind(self, name: str, curvature: Curvature) -> str:
        kind = type(curvature).__name__
        if not curvature.fitted:
            raise NotFittedError(f"`write_curvature({name!r})`: {kind} has not seen its data yet, call fit first.")
        if CURVATURES.get(kind) is not type(curvature):
            raise ValueError(
                f"`write_curvature({name!r})`: {kind} could not be read back, expected one of {sorted(CURVATURES)}. "
                "Keep its settings and fit it again; a class of your own that has a state goes into "
                "lightning_influence.curvature.CURVATURES."
            )
        return kind

    def _only_file(self, group: str, name: str) -> Path:
        return self._directory.checked(self._directory.entry(group, name)["files"][0])

    def _refuse(self, differences: Iterable[str]) -> None:
        lines = "".join(f"\n- {line}" for line in differences)
        if lines:
            raise StoreError(
                f"{self} does not fit:{lines}\nExpected the model, components and settings it was recorded with; "
                "record again into another directory otherwise."
            )
