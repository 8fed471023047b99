"""Interaction-aware greedy over a pool whose rows are spread over processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_influence.capture.contexts import full_precision
from lightning_influence.estimators.factors import Factors, Id
from lightning_influence.selection.budget import resolve_budget
from lightning_influence.selection.greedy_exchange import Exchange
from lightning_influence.selection.greedy_search import GreedySearch
from lightning_influence.selection.selection import Selection

_CALL = "select_sharded"


class Ranks(Exchange):
    """The ranks of a process group, each with some rows of the pool.

    Args:
        count: Rows of this rank.
        device: Where the group exchanges tensors: "cpu" for gloo, the rank's GPU for NCCL.
        group: The default group when None.
    """

    def __init__(self, count: int, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self._group, self._device, self.offset = group, device, 0
        sizes = self.gather(torch.tensor([count], device=device)).tolist()
        self.offset, self.total = sum(sizes[: dist.get_rank(group)]), sum(sizes)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all ranks below each other; n may differ."""
        ranks = dist.get_world_size(self._group)
        counts = [torch.zeros(1, dtype=torch.long, device=self._device) for _ in range(ranks)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=self._device), group=self._group)
        most = max(int(count) for count in counts)
        padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype, device=self._device)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def agree(self, decision: Tensor) -> Tensor:
        """The decision of rank 0."""
        decision = decision.contiguous()
        source = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        dist.broadcast(decision, source, group=self._group)
        return decision


@full_precision()
def select_sharded(
    values: Tensor,
    features: Tensor,
    metric: Tensor | None = None,
    *,
    budget: int | float,
    ids: Iterable[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Selection:
    """`InteractionGreedy` over the rows of all ranks of a process group; the same picks as one process would make.

    Every rank calls it with its own rows. Per round, ranks exchange the ids, scores and features of a few hundred
    candidates, then those of the rows that may win; each rank bounds and evaluates its own rows only.

    Args:
        values: b [n] of this rank's rows, n >= 1; b_j > 0: adding row j lowers the target loss.
        features: F [n, r] of this rank's rows.
        metric: M [r, r], the same on every rank; the identity when None.
        budget: Number of rows (int >= 1) or share of the whole pool (float in (0, 1]).
        ids: Ints that are unique in the whole pool; by default positions in the pool, rank by rank.
        group: The default process group when None.

    Returns:
        The same selection on every rank; ``positions`` count the rows of the ranks one after the other.

    Raises:
        ValueError: On every rank, as `InteractionGreedy.select` does, also where only another rank's rows are unfit.
        RuntimeError: If there is no process group.
    """
    if not dist.is_initialized():
        raise RuntimeError(f"`{_CALL}`: expected a process group. Call `torch.distributed.init_process_group` first.")
    device = torch.as_tensor(features).device
    pool, names = _checked(values, features, metric, ids, device, group)
    ranks = Ranks(len(pool), device, group)
    own = torch.arange(ranks.offset, ranks.offset + len(pool)) if names is None else names
    every = ranks.gather(own.to(device))
    ordered = every.sort().values
    if bool((ordered[1:] == ordered[:-1]).any()):
        raise ValueError(f"`{_CALL}(ids)`: expected ids that are unique in the whole pool, not only on each rank.")
    keys = torch.searchsorted(ordered, own.to(device))
    count = resolve_budget(budget, ranks.total, _CALL)
    picks = list(GreedySearch(pool, keys, ranks).picks(count))
    first_order = torch.tensor([-pick.value for pick in picks], dtype=torch.float64)
    gains = torch.tensor([pick.score for pick in picks], dtype=torch.float64)
    positions = tuple(pick.position for pick in picks)
    return Selection(
        ids=tuple(every[list(positions)].tolist()),
        positions=positions,
        gains=gains,
        first_order=first_order,
        interaction=gains - first_order,
        budget=count,
        objective=float(gains.sum()),
        rule="InteractionGreedy()",
        pool_size=ranks.total,
    )


def _checked(
    values: Tensor,
    features: Tensor,
    metric: Tensor | None,
    ids: Iterable[int] | None,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> tuple[Factors, Tensor | None]:
    """This rank's factors and ids; raises on every rank if one of them has unfit arguments."""
    problem, pool, names, width = None, None, None, 0
    try:
        pool = Factors.checked(_CALL, values, features, metric, ids)
        names = None if ids is None else _integers(pool.ids)
        width = torch.as_tensor(features).shape[1]
    except ValueError as error:
        problem = error
    told = Ranks(1, device, group).gather(torch.tensor([[width, problem is not None, ids is None]], device=device))
    if problem is not None:
        raise problem
    failed = told[:, 1].nonzero().flatten().tolist()
    if failed or pool is None:
        raise ValueError(f"`{_CALL}`: the arguments of rank {failed[0]} are unfit; its own error says why.")
    if bool((told != told[0]).any()):
        raise ValueError(
            f"`{_CALL}`: expected features of the same width on every rank, and ids on all of them or on none. "
            f"Got widths {told[:, 0].tolist()} and ids on {int((told[:, 2] == 0).sum())} of {len(told)} ranks."
        )
    return pool, names


def _integers(names: Iterable[Id]) -> Tensor:
    if not all(isinstance(name, int) for name in names):
        raise ValueError(f"`{_CALL}(ids)`: expected ints, which ranks can exchange. Number the rows of the pool.")
    return torch.tensor(list(names))
