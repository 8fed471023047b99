"""Numbers of a rule's own about every row, found again by id in the pool that it chooses from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors, Id, check_finite, few


def places(call: str, pool: Sequence[Id], known: Sequence[Id]) -> list[int]:
    """Where each id of a pool stands among the ids that a rule has data for.

    Raises:
        ValueError: If the rule knows nothing of an id of the pool, which is named.
    """
    where = {name: k for k, name in enumerate(known)}
    missing = [name for name in pool if name not in where]
    if missing:
        raise ValueError(
            f"`{call}`: expected data for every row of the pool; of {len(missing)} of {len(pool)} rows there is none: "
            f"{few(missing)}. Rows are matched by id, by position where no ids were given."
        )
    return [where[name] for name in pool]


def of_rows(call: str, names: Sequence[Id], given: Any) -> list[Any]:
    """What is given for each of some rows: in a sequence by position, or a mapping or function by id.

    Raises:
        ValueError: If there is nothing for an id, which is named; or more in a sequence than there are rows, where a
            range of row numbers stands for their ids.
    """
    if callable(given):
        return [given(name) for name in names]
    listed = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(names, range):
        check_positions(call, by_position(listed), len(names))
    places(call, names, list(listed) if isinstance(listed, Mapping) else range(len(listed)))
    return [listed[name] for name in names]


def by_position(given: Any) -> int:
    """For how many rows something is given in a sequence; 0 where it is a mapping or function, or nothing."""
    return 0 if given is None or callable(given) or isinstance(given, Mapping) else len(given)


def check_positions(call: str, known: int, rows: int) -> None:
    """Refuse data by position of more rows than a pool has: it is that of another, and would fall to other rows.

    Raises:
        ValueError: If it is.
    """
    if known > rows:
        raise ValueError(
            f"`{call}`: expected data for each of the {rows} rows of the pool, by position. There is some for {known}: "
            "pass that of these rows, in their order, or ids for both."
        )


def rows_by_id(call: str, pool: Factors, embeddings: Any, ids: Sequence[Id] | None) -> Tensor:
    """Vectors for the rows of a pool in the order of their ids, float64 [n, d].

    The order of the ids is one that permuting the pool does not change, so that all that is computed from it is the
    same to the last bit.

    Args:
        call: How the caller's code reads, for the error text.
        pool: Whose features are taken where there are no embeddings.
        embeddings: [N, d] of at least the rows of the pool, or None.
        ids: Those of the embeddings; None for positions.

    Raises:
        ValueError: If there is neither, or rows of the pool have no embedding, or one that is not finite (ids are
            named).
    """
    by_id = pool.id_ranks.cpu().argsort()
    vectors: Tensor
    if embeddings is None:
        if pool.features is None:
            raise ValueError(f"`{call}(features=None)`: expected features [n, r], or embeddings=[n, d] for the rule.")
        vectors = pool.features.detach().cpu()[by_id]
    else:
        known = range(len(embeddings)) if ids is None else ids
        names = [pool.ids[row] for row in by_id.tolist()]
        vectors = embeddings[torch.tensor(places(call, names, known))]
        check_finite(call, "embeddings", vectors.isfinite().all(1), names)
    return vectors.double()


def unit_rows(call: str, pool: Factors, embeddings: Any, ids: Sequence[Id] | None) -> Tensor:
    """`rows_by_id` at length 1; a row of zeros stays so."""
    vectors = rows_by_id(call, pool, embeddings, ids)
    tiny = torch.finfo(torch.float64).tiny
    vectors = vectors / vectors.abs().amax(1, keepdim=True).clamp_min(tiny)
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / lengths.clamp_min(tiny)


def checked_embeddings(call: str, embeddings: Any, ids: Sequence[Id] | None) -> Tensor | None:
    """Embeddings as a tensor [N, d] on the CPU.

    Raises:
        ValueError: If they are not numbers of that shape, or ids are not one for each of them, all different.
    """
    if embeddings is None:
        if ids is not None:
            raise ValueError(f"`{call}(ids=...)`: expected embeddings to go with the ids.")
        return None
    found = torch.as_tensor(np.asarray(embeddings) if isinstance(embeddings, list | tuple) else embeddings)
    found = found.detach().cpu()
    if found.dim() != 2 or 0 in found.shape or found.is_complex():
        raise ValueError(f"`{call}(embeddings)`: expected real numbers [n, d], got shape {list(found.shape)}.")
    if ids is not None and (len(ids) != len(found) or len(set(ids)) < len(ids)):
        raise ValueError(
            f"`{call}(ids)`: expected one id for each of {len(found)} embeddings, all different; got {len(ids)} ids, "
            f"{len(set(ids))} of them different."
        )
    return found
