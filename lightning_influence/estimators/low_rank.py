"""Query gradients of low rank: what training gradients are multiplied with, in two thin factors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.capture import Component, LayerRecord
from lightning_influence.capture.budget import at_once
from lightning_influence.capture.contexts import full_precision
from lightning_influence.capture.record import CHUNK, FactoredRecord

WRITTEN = 32  # multiplications of a matrix product that take as long as one entry of a result takes to write


@dataclass(frozen=True, eq=False)
class LowRank:
    """Matrices [q, o, i] as ``left right``.

    Attributes:
        left: [q, o, r].
        right: [q, r, i].
        keeps: Whether there is memory for the matrices too, once they are needed.
    """

    left: Tensor
    right: Tensor
    keeps: bool = False

    @full_precision()
    def dense(self) -> Tensor:
        """[q, o, i]."""
        return torch.bmm(self.left, self.right)

    @cached_property
    def kept(self) -> Tensor:
        """The same, made once."""
        return self.dense()


Operand: TypeAlias = Tensor | LowRank


def check_rank(call: str, rank: int | float | None, *, bilinear: bool) -> None:
    """Refuse what is neither a rank nor a share, and any for scores that are no inner products.

    Raises:
        ValueError: Unless ``rank`` is None, or an int >= 1 or a float in (0, 1] of a bilinear estimator.
    """
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if rank is not None and not whole and not (isinstance(rank, float) and 0 < rank <= 1):
        raise ValueError(
            f"`{call}(rank={rank!r})`: expected an int >= 1, or a share of the energy as a float in (0, 1]."
        )
    if rank is not None and not bilinear:
        raise ValueError(
            f"`{call}(rank={rank!r})`: scores are not inner products of a query and a training gradient, so that the "
            "error of a low rank is not bounded. Expected None."
        )


def rank_note(rank: int | float | None) -> str:
    """For the labels of scores."""
    if rank is None:
        return ""
    return f"queries of rank {rank}" if isinstance(rank, int) else f"queries to {rank:.6g} of their energy"


def low_rank(gradients: Mapping[str, Tensor], components: Iterable[Component], rank: int | float) -> dict[str, Operand]:
    """Queries with the matrices of linear layers and convolutions truncated, other components as they are.

    Raises:
        ValueError: If no component has a matrix.
    """
    matrices = {c.name for c in components if c.kind in ("linear", "conv") and gradients[c.name].dim() == 3}
    if not matrices:
        raise ValueError(
            f"`rank={rank!r}`: none of the {len(gradients)} components, such as {list(gradients)[:4]}, has gradients "
            "that are matrices of a linear layer or convolution. Expected rank=None."
        )
    return {name: truncated(g, rank) if name in matrices else g for name, g in gradients.items()}


@full_precision()
def truncated(matrices: Tensor, rank: int | float) -> Operand:
    """The closest matrices of a rank, or of the least rank with a share of the squared singular values.

    A score changes by no more than the root of what is left out of these squares, times the length of the training
    gradient. In factors where these have fewer numbers than the matrix.

    Args:
        matrices: [q, o, i].
        rank: An int for the rank; a float for the share.
    """
    _, o, i = matrices.shape
    tall = matrices if o >= i else matrices.mT
    bases = [_leading(matrix, rank) for matrix in tall]  # each query its own rank, whatever else is in the block
    r = max(basis.shape[1] for basis in bases)
    thin = torch.stack([F.pad(basis, (0, r - basis.shape[1])) for basis in bases])
    wide = torch.bmm(tall, thin)
    found = LowRank(wide, thin.mT) if o >= i else LowRank(thin, wide.mT)
    return found if r * (o + i) < o * i else found.dense()


def _leading(matrix: Tensor, rank: int | float) -> Tensor:
    """Leading right singular vectors [i, r] of a tall matrix [o, i], in its dtype.

    They are the eigenvectors of its Gram matrix, in float64: a third of the work of singular values. The Gram matrix
    knows small singular values less well, but their squares, which make up the energy, to rounding of the largest; and
    what is projected onto the leading vectors has an error of second order in theirs.
    """
    wide = matrix.double()
    energies, vectors = torch.linalg.eigh(wide.mT @ wide)
    if isinstance(rank, float):
        energy = energies.clamp_min(0).flip(0).cumsum(0)
        rank = int((energy < rank * energy[-1]).sum()) + 1
    leading: Tensor = vectors[:, -min(rank, len(energies)) :].flip(1).to(matrix.dtype)
    return leading


def gathered(blocks: Iterable[dict[str, Operand]], memory: int) -> Iterator[dict[str, Operand]]:
    """Blocks joined as long as they fit into memory, so that the training data is passed over fewer times.

    Args:
        blocks: Of truncated queries.
        memory: Bytes for what is joined; the block that is truncated next comes on top. Where they hold the matrices
            beside their factors, those that are needed are made once.
    """
    kept: list[dict[str, Operand]] = []
    for block in blocks:
        if kept and sum(map(_size, (*kept, block))) > memory:
            yield _joined(kept, memory)
            kept = []
        kept.append(block)
    if kept:
        yield _joined(kept, memory)


def _size(block: Mapping[str, Operand]) -> int:
    parts = (t for v in block.values() for t in ((v.left, v.right) if isinstance(v, LowRank) else (v,)))
    return sum(t.numel() * t.element_size() for t in parts)


def _joined(blocks: list[dict[str, Operand]], memory: int) -> dict[str, Operand]:
    joined = {name: _stacked([block[name] for block in blocks]) for name in blocks[0]}
    matrices = sum(v.left[:, :, :1].nbytes * v.right.shape[2] for v in joined.values() if isinstance(v, LowRank))
    keeps = _size(joined) + matrices <= memory
    return {name: replace(v, keeps=keeps) if isinstance(v, LowRank) else v for name, v in joined.items()}


def _stacked(parts: list[Operand]) -> Operand:
    thin = [part for part in parts if isinstance(part, LowRank)]
    if len(thin) < len(parts):
        return torch.cat([part.dense() if isinstance(part, LowRank) else part for part in parts])
    r = max(part.left.shape[2] for part in thin)
    lefts = [F.pad(part.left, (0, r - part.left.shape[2])) for part in thin]
    rights = [F.pad(part.right, (0, 0, 0, r - part.right.shape[1])) for part in thin]
    return LowRank(torch.cat(lefts), torch.cat(rights))


@full_precision()
def contract(record: LayerRecord, gradients: Operand) -> Tensor:
    """Inner products with every example, [q, n]: through the thin factors where that takes fewer multiplications."""
    if not isinstance(gradients, LowRank):
        return record.contract(gradients)
    if not isinstance(record, FactoredRecord) or not thin_is_cheaper(record, gradients):
        if gradients.keeps:
            return record.contract(gradients.kept)
        return torch.cat([record.contract(part.dense()) for part in _few(gradients)])
    (n, t, i, o), (q, _, r) = record.sizes, gradients.left.shape
    right, left = gradients.right.reshape(q * r, i), gradients.left.mT.reshape(q * r, o)
    step = max(1, at_once(CHUNK, record.device) // max(1, t * q * r))
    parts = []
    for part in (record.narrow(k, min(k + step, n)) for k in range(0, n, step)):
        product = part.inputs.reshape(-1, i) @ right.mT
        product *= part.gradients.reshape(-1, o) @ left.mT
        parts.append(product.reshape(len(part), t, q, r).sum((1, 3)).mT)
    return torch.cat(parts, dim=1)


def _few(gradients: LowRank) -> Iterator[LowRank]:
    """In parts whose matrices are of moderate size: many more factors than matrices fit into memory."""
    q, o, _ = gradients.left.shape
    step = max(1, 4 * CHUNK // (o * gradients.right.shape[2]))
    return (LowRank(gradients.left[k : k + step], gradients.right[k : k + step]) for k in range(0, q, step))


def thin_is_cheaper(record: FactoredRecord, gradients: LowRank) -> bool:
    """Whether ``sum over t of (s_t^T left)(right a_t)`` is less work than the matrices rebuilt, by multiplications.

    With those, training gradients are formed unless a product with every position is less. Matrices that are kept cost
    nothing, so that low rank never takes longer than the whole rank does.
    """
    (n, t, i, o), (q, _, r) = record.sizes, gradients.left.shape
    rebuilt = 0 if gradients.keeps else q * o * i * (r + WRITTEN)
    direct = n * t * q * o * (i + 1)
    through = n * o * i * (t + q + WRITTEN)
    return n * t * q * r * (i + o + WRITTEN) <= rebuilt + (through if q * t > q + t else direct)
