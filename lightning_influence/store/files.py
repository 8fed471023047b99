"""Files that are there whole or not at all, and are what they were when they were written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_influence.errors import StoreError

StoredDtype: TypeAlias = Literal["bfloat16"]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary neighbour, then give it its name in one step.

    The temporary name is always the same: what a killed run left behind is overwritten by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON, keys sorted, so that equal content is equal bytes."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def as_json(value: Any, what: str) -> Any:
    """The value as it comes back from a file: tuples are lists, keys are strings.

    Raises:
        ValueError: If it cannot be written as strict JSON.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{what}`: expected plain JSON values (finite numbers, str, list, dict): {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file; every tensor gets memory of its own, which the format asks for."""
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    replace_file(path, lambda partial: save_file(own, partial))


def narrowed(
    tensors: Mapping[str, Tensor], dtype: StoredDtype | None, what: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Floating-point tensors in a dtype to store them in, and what a manifest says of that.

    Returns:
        The tensors, and for the dtype of those that changed, ``{"float32": "bfloat16"}``; other dtypes stay.

    Raises:
        ValueError: If the dtype is not ``"bfloat16"``, or the tensors have several, so that there is no way back.
    """
    if dtype is None:
        return dict(tensors), {}
    if dtype != "bfloat16":
        raise ValueError(f"`{what[:-1]}, dtype={dtype!r})`: expected 'bfloat16', or None to keep all digits.")
    wide = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    if len(wide) > 1:
        raise ValueError(f"`{what[:-1]}, dtype={dtype!r})`: there are tensors of {sorted(wide)}; expected one dtype.")
    found = {k: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for k, tensor in tensors.items()}
    return found, dict.fromkeys(wide, dtype)


def widened(tensors: Mapping[str, Tensor], dtypes: Mapping[str, str] | None, what: str) -> dict[str, Tensor]:
    """Undo `narrowed`, except for the digits.

    Raises:
        StoreError: If the tensors do not have the dtype that the manifest says.
    """
    if not dtypes:
        return dict(tensors)
    [(wide, narrow)] = dtypes.items()
    found = {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()} - {narrow}
    if found:
        raise StoreError(f"{what}: the manifest says {narrow}, the files hold {sorted(found)}. Record again.")
    return {k: t.to(getattr(torch, wide)) if t.is_floating_point() else t for k, t in tensors.items()}


def shards(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Cut a dictionary into pieces of at most ``max_bytes``; a larger tensor gets a piece of its own.

    >>> import torch
    >>> [list(piece) for piece in shards({"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(9)}, 12)]
    [['a', 'b'], ['c']]
    """
    piece: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if piece and size + tensor.nbytes > max_bytes:
            yield piece
            piece, size = {}, 0
        piece[name] = tensor
        size += tensor.nbytes
    if piece:
        yield piece


def checksum(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_file(path: Path, expected: str) -> Path:
    """The path, once the file behind it is what the manifest says.

    Raises:
        StoreError: If the file is missing or has changed.
    """
    if not path.is_file():
        raise StoreError(f"{path} is missing. Restore the file, or record again into another directory.")
    found = checksum(path)
    if found != expected:
        raise StoreError(
            f"{path} is damaged: sha256 {expected[:12]}... stored, {found[:12]}... found. "
            "Restore the file, or record again into another directory."
        )
    return path
