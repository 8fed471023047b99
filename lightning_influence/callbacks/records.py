"""The folders of a recorder on disk, which are the only truth about what has been recorded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

RECORD_FILE = "record.json"
_UNFINISHED = ".tmp"


@dataclass(frozen=True)
class Record:
    """One finished recording.

    Attributes:
        path: Its folder, ``<root>/<recorder>/step=00000012``.
        step: Number of optimizer steps the weights had seen.
        trigger: ``"checkpoint"`` or ``"fit_end"``.
        checkpoint: The checkpoint file with the same weights, where it is known; it may be deleted by now.
        weights: `model_fingerprint` of the parameters.
        seconds: Time the recording took.
    """

    path: Path
    step: int
    trigger: str
    checkpoint: str | None
    weights: str
    seconds: float


def find_records(root: str | Path) -> list[Record]:
    """All finished recordings below a recorder's root, by step; none if there is no such folder."""
    files = [f for f in Path(root).glob(f"step=*/{RECORD_FILE}") if f.parent.suffix != _UNFINISHED]
    return sorted(map(_read, files), key=lambda record: record.step)


def resolve_root(trainer: Trainer, dirpath: str | None, name: str) -> Path:
    """A recorder's folder, the same on every rank.

    Args:
        trainer: A Trainer whose checkpoint callbacks have been set up.
        dirpath: Parent of the folder; None takes ``influence`` beside the checkpoints.
        name: The recorder's name.

    Raises:
        MisconfigurationException: If that is not a folder of this machine.
    """
    beside = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    parent = str(beside) if dirpath is None else dirpath
    if "://" in parent:
        raise MisconfigurationException(
            f"{parent}: recordings are written to a local folder. Pass `dirpath=` to the recorder."
        )
    root: str = trainer.strategy.broadcast(os.path.join(parent, *(["influence"] if dirpath is None else []), name))
    return Path(root)


def folder(root: Path, step: int) -> Path:
    """Where the recording of a step belongs."""
    return root / f"step={step:08d}"


def unfinished(root: Path, step: int) -> Path:
    """Where it is written until it is complete."""
    return folder(root, step).with_suffix(_UNFINISHED)


def begin(temporary: Path) -> None:
    """Make an empty folder."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def finish(temporary: Path, record: Record) -> None:
    """Give a written folder its final name, in place of an older recording of the same step."""
    values = {key: value for key, value in asdict(record).items() if key != "path"}
    (temporary / RECORD_FILE).write_text(json.dumps({"version": 1, **values}, indent=2) + "\n")
    shutil.rmtree(record.path, ignore_errors=True)
    os.replace(temporary, record.path)


def sweep(root: Path) -> None:
    """Delete what a killed run left unfinished."""
    for temporary in root.glob(f"step=*{_UNFINISHED}"):
        shutil.rmtree(temporary, ignore_errors=True)


def prune(root: Path, kept: Iterable[str]) -> None:
    """Delete recordings whose checkpoint is gone, or was overwritten by that of a later step.

    Args:
        root: The recorder's root.
        kept: Checkpoints that still exist or are about to be written. Recordings of unknown checkpoints stay.
    """
    files = {os.path.abspath(path) for path in kept}
    newest: dict[str, int] = {}
    records = [(os.path.abspath(r.checkpoint), r) for r in find_records(root) if r.checkpoint is not None]
    for file, record in records:
        newest[file] = max(record.step, newest.get(file, 0))
    for file, record in records:
        gone = file not in files and not os.path.exists(file)
        if gone or record.step < newest[file]:
            shutil.rmtree(record.path, ignore_errors=True)


def _read(file: Path) -> Record:
    values = json.loads(file.read_text())
    version = values.pop("version")
    if version != 1:
        raise ValueError(f"{file}: expected a record of version 1, found {version}; update lightning_influence.")
    return Record(path=file.parent, **values)
