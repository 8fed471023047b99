"""Groups to leave out, and subsets to train on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Id, check_ids


def neighbour_groups(
    outputs: Tensor,
    size: int,
    count: int = 50,
    *,
    seed: int = 0,
    ids: Sequence[Id] | None = None,
    anchors: Sequence[Id] | None = None,
) -> list[tuple[Id, ...]]:
    """Groups of alike examples: an anchor and its nearest neighbours in the space of the model's outputs ([IA]).

    Large groups around different anchors can be the same set, such as all of one class: fewer cases than ``count``.

    Args:
        outputs: Softmax outputs [n, classes], not logits; for regression the predictions, [n] or [n, o].
        size: Examples of a group, the anchor included; it comes first, then the nearest.
        count: Number of groups.
        seed: Anchors are drawn by it, each once.
        ids: Ids of the examples; row numbers when None.
        anchors: Ids of the anchors instead; ``count`` and ``seed`` are not used then.

    Raises:
        ValueError: If there are fewer examples than a group or than groups, outputs are not finite (ids are named), or
            an anchor is unknown.

    >>> neighbour_groups(torch.tensor([0.1, 0.9, 0.2, 0.7]), size=2, anchors=[0, 1])
    [(0, 2), (1, 3)]
    """
    call = "neighbour_groups"
    if outputs.dim() not in (1, 2) or 0 in outputs.shape or outputs.is_complex():
        raise ValueError(f"`{call}(outputs)`: expected [n] or [n, classes], n >= 1. Got shape {list(outputs.shape)}.")
    places = outputs.detach().cpu().double().reshape(len(outputs), -1)
    names = check_ids(call, ids, len(places))
    bad = [name for name, fine in zip(names, places.isfinite().all(1).tolist(), strict=True) if not fine]
    if bad:
        raise ValueError(f"`{call}(outputs)`: expected finite numbers; those of ids {bad[:8]} are not.")
    _check_number(call, "size", size, len(names))
    rows = {name: row for row, name in enumerate(names)}
    if anchors is None:
        _check_number(call, "count", count, len(names))
        middles = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    else:
        unknown = [name for name in anchors if name not in rows]
        if unknown or not anchors:
            raise ValueError(f"`{call}(anchors)`: expected ids of the examples, at least one. Unknown: {unknown[:8]}.")
        middles = [rows[name] for name in anchors]
    groups = []
    for row in middles:
        distances = (places - places[row]).square().sum(1)
        distances[row] = -1  # before its copies
        groups.append(tuple(names[k] for k in distances.argsort(stable=True)[:size].tolist()))
    return groups


def random_subsets(ids: int | Sequence[Id], count: int, share: float = 0.5, *, seed: int = 0) -> list[tuple[Id, ...]]:
    """Random subsets of a training set, as the LDS takes them (Park et al. 2023, section 2.3: half of it).

    Args:
        ids: Ids of the training examples, or their number.
        count: Number of subsets.
        share: Of the examples that a subset holds, rounded.
        seed: Of the draws.

    Raises:
        ValueError: If the share is not within (0, 1), a subset would be empty or everything, or ``count`` < 1.

    >>> random_subsets(6, count=2)
    [(2, 3, 5), (0, 3, 5)]
    """
    names = tuple(range(ids)) if isinstance(ids, int) else check_ids("random_subsets", ids, len(ids))
    if type(count) is not int or count < 1:
        raise ValueError(f"`random_subsets(count={count!r})`: expected an int >= 1.")
    size = round(share * len(names)) if 0 < share < 1 else 0
    if not 0 < size < len(names):
        raise ValueError(
            f"`random_subsets(share={share!r})`: expected a share in (0, 1) that leaves at least one of "
            f"{len(names)} examples in and one out."
        )
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randperm(len(names), generator=generator)[:size].sort().values for _ in range(count))
    return [tuple(names[k] for k in draw.tolist()) for draw in draws]


def _check_number(call: str, name: str, value: int, n: int) -> None:
    if type(value) is not int or not 1 <= value <= n:
        raise ValueError(f"`{call}({name}={value!r})`: expected an int from 1 to {n}, the number of examples.")
