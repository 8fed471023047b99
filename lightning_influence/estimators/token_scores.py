"""Influence of every position (token) of a training example: a sum over positions, taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.capture import Component, LayerRecord
from lightning_influence.capture.budget import at_once
from lightning_influence.capture.contexts import full_precision
from lightning_influence.capture.finite import check_gradients
from lightning_influence.capture.record import CHUNK, FactoredRecord, IndexedRecord, SumRecord


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Influence of each position of each training example on queries. Score > 0: it lowers the query's loss.

    Position t is where a layer acted: its input there, times the gradient of the example's loss with respect to its
    output there, whichever later tokens that loss is of. ``values[i].sum(1) + rest[:, i]`` is the example's score.

    Taken apart are linear layers, convolutions without groups (by positions of their output) and embeddings that have
    as many positions as the example. Normalisation layers, grouped convolutions, layers without a rule of their own,
    and layers behind a mean over positions are not.

    Attributes:
        values: For each training example [q, t_i], over its positions in order, without padding.
        rest: Scores of the components that have no such positions, and of padding, [q, n].
        query_ids: Ids of the q queries.
        train_ids: Ids of the n training examples.
        components: Names of the components that were taken apart.
        whole: Names of the components in ``rest``.
        formula: What was computed.
        reduction: How an example's own loss is formed.
        damping: Description of the damping, or None where there is none.
    """

    values: tuple[Tensor, ...]
    rest: Tensor
    query_ids: tuple[int | str, ...]
    train_ids: tuple[int | str, ...]
    components: tuple[str, ...]
    whole: tuple[str, ...]
    formula: str
    reduction: str
    damping: str | None = None

    def __post_init__(self) -> None:
        """Labels must fit the values."""
        q, n = len(self.query_ids), len(self.train_ids)
        odd = [tuple(v.shape) for v in self.values if v.dim() != 2 or len(v) != q]
        if tuple(self.rest.shape) != (q, n) or len(self.values) != n or odd:
            raise ValueError(
                f"`TokenScores(values=[{len(self.values)} tensors], rest={tuple(self.rest.shape)})`: expected {n} of "
                f"shape [{q}, positions] and [{q}, {n}] from the labels, got {odd[:4] or 'others'}."
            )

    def __repr__(self) -> str:
        """Sizes and labels, without the numbers and the ids."""
        sizes = f"{len(self.query_ids)} queries x {sum(v.shape[1] for v in self.values)} positions"
        return f"TokenScores({sizes} of {len(self.train_ids)} training examples, formula={self.formula!r})"


@dataclass
class Positions:
    """What `TokenScores` is made of, filled batch by batch.

    Attributes:
        split: Whether a component has positions that are an example's, by name, in every batch so far.
    """

    values: list[Tensor] = field(default_factory=list)
    rest: list[Tensor] = field(default_factory=list)
    split: dict[str, bool] = field(default_factory=dict)

    def update(
        self,
        queries: Mapping[str, Tensor],
        records: Iterator[tuple[Component, LayerRecord]],
        mask: Tensor | None,
        scales: bool = False,
    ) -> None:
        """Take in a batch.

        Args:
            queries: What gradients are multiplied with, by component, [q, *shape].
            records: Of the batch.
            mask: Positions that belong to an example, bool [n, t]; None for all, of which there are as many as most
                that a component has.
            scales: Whether to divide by the length of an example's whole gradient.
        """
        found = [(c.name, r) for c, r in records]
        t = max((positions_of(r) for _, r in found), default=0) if mask is None else mask.shape[1]
        n, q = len(found[0][1]), len(queries[found[0][0]])
        inside, outside = torch.zeros(q, n, t, dtype=torch.float64), torch.zeros(q, n, dtype=torch.float64)
        for name, record in found:
            apart = t > 0 and positions_of(record) == t
            self._note(name, apart)
            if apart:
                inside += by_position(record, queries[name]).cpu()
            else:
                outside += record.contract(queries[name]).cpu()
        check_gradients(found[0][1].ids, (inside.sum(2) + outside).isfinite().all(0), "training examples")
        kept = torch.ones(n, t, dtype=torch.bool) if mask is None else mask.cpu()
        outside += (inside * ~kept).sum(2)  # padding on the left predicts the first token
        dtype = queries[found[0][0]].dtype
        scale = _inverse_lengths([r for _, r in found]) if scales else torch.ones(n)
        inside, outside = (inside * scale[:, None]).to(dtype), (outside * scale).to(dtype)
        self.values += [inside[:, i, kept[i]] for i in range(n)]
        self.rest.append(outside)

    def _note(self, name: str, apart: bool) -> None:
        if self.split.setdefault(name, apart) != apart:
            raise ValueError(
                f"`token_scores`: {name} has as many positions as the examples in some batches only; expected "
                "components that have them in all. Leave it out with components=."
            )


def joined(
    blocks: Sequence[Positions],
    call: str,
    query_ids: tuple[int | str, ...],
    train_ids: tuple[int | str, ...],
    **labels: Any,
) -> TokenScores:
    """The scores of all queries, from those of blocks of them.

    Raises:
        ValueError: If no component was taken apart.
    """
    split = blocks[0].split
    if not any(split.values()):
        raise ValueError(
            f"`{call}`: none of the {len(split)} components, such as {list(split)[:4]}, has a gradient that is a sum "
            "over positions. Expected linear layers, embeddings or convolutions without groups, not projected."
        )
    return TokenScores(
        values=tuple(torch.cat(parts) for parts in zip(*(block.values for block in blocks), strict=True)),
        rest=torch.cat([torch.cat(block.rest, dim=1) for block in blocks]),
        query_ids=query_ids,
        train_ids=train_ids,
        components=tuple(name for name, apart in split.items() if apart),
        whole=tuple(name for name, apart in split.items() if not apart),
        **labels,
    )


def positions_of(record: LayerRecord) -> int:
    """Number of positions whose outer products (or rows) add up to the gradient; 0 where it is a sum already."""
    if isinstance(record, FactoredRecord | IndexedRecord):
        return record.gradients.shape[1]
    if isinstance(record, SumRecord):
        counts = {positions_of(part) for part in record.parts}
        return counts.pop() if len(counts) == 1 else 0
    return 0


@full_precision()
def by_position(record: LayerRecord, gradients: Tensor) -> Tensor:
    """``s_t^T V a_t`` of every position: [q, *shape] -> [q, n, t]."""
    if isinstance(record, SumRecord):
        return torch.stack([by_position(part, gradients) for part in record.parts]).sum(0)
    assert isinstance(record, FactoredRecord | IndexedRecord)
    q, (n, t, o) = len(gradients), record.gradients.shape
    step = max(1, at_once(CHUNK, record.device) // max(1, q * t * o))
    parts = (record.narrow(k, min(k + step, n)) for k in range(0, n, step))
    return torch.cat([_by_position(part, gradients) for part in parts], dim=1)


def _by_position(record: FactoredRecord | IndexedRecord, gradients: Tensor) -> Tensor:
    if isinstance(record, IndexedRecord):
        return torch.einsum("qntd,ntd->qnt", gradients[:, record.indices], record.gradients)
    n, t, i, o = record.sizes
    moved = record.inputs.reshape(-1, i) @ gradients.reshape(-1, i).mT
    return torch.einsum("ntqo,nto->qnt", moved.reshape(n, t, -1, o), record.gradients)


def _inverse_lengths(records: Sequence[LayerRecord]) -> Tensor:
    squares = torch.stack([record.squared_norms().cpu() for record in records]).sum(0).double()
    return torch.where(squares > 0, squares.clamp_min(torch.finfo(squares.dtype).tiny).rsqrt(), 0.0)
