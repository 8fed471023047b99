"""What a greedy choice of components maximises: means over queries, evaluated for many sets of components at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Objective: TypeAlias = Literal["accuracy", "mrr", "similarity"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)

_CONSTANT = 1e-12  # cosines whose deviations from their mean have a smaller norm are the same up to rounding


@dataclass(frozen=True, eq=False)
class Sums:
    """Summed products over m sets of components, for the queries of one block; used up by the evaluation.

    Attributes:
        dots: D^S, float64 [m, k, q], the true source first.
        squares: The same of the candidates with themselves, [m, k, q].
        query_squares: The same of the queries with themselves, [m, q].
        spare: Room for [m, k, q].
    """

    dots: Tensor
    squares: Tensor
    query_squares: Tensor
    spare: Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """What is known of a block of queries apart from the sums.

    Attributes:
        padding: Bool [k, q], True where there is no candidate; None: there is one everywhere.
        zeros: Whether some example has no gradient in some component.
        eps: ε of the cosine.
        whole: cos_W less its mean over a query's candidates, of unit length, [k, q]; 0 where cos_W is constant.
    """

    padding: Tensor | None
    zeros: bool
    eps: float
    whole: Tensor


def accuracy(sums: Sums, block: Block) -> Tensor:
    """Whether the true source is strictly above every other candidate, bool [m, q]."""
    scores = _ordering(sums, block)
    return scores[:, 0] > scores[:, 1:].amax(1)


def reciprocal_rank(sums: Sums, block: Block) -> Tensor:
    """1 / (1 + number of other candidates not below the true source), [m, q]."""
    scores = _ordering(sums, block)
    above = scores[:, 1:].ge_(scores[:, :1])
    return above.sum(1).add_(1).reciprocal_()


def similarity(sums: Sums, block: Block) -> Tensor:
    """Correlation of cos_S with cos_W over the candidates, [m, q].

    Pearson's; where exactly one of the two is constant it is 0, where both are it is 1.
    """
    cosines = _cosines(sums, block)
    if block.padding is not None:
        cosines.masked_fill_(block.padding, 0)
    centred, length = _centred(cosines, block.padding, sums.spare)
    agreement = torch.mul(centred, block.whole, out=sums.spare).sum(1) / length
    constant = length <= _CONSTANT
    both = constant & ~block.whole.any(0)
    return agreement.masked_fill_(constant, 0).add_(both)


def unit_deviations(sums: Sums, block: Block) -> Tensor:
    """cos_S less its mean over a query's candidates, of unit length, [m, k, q]; 0 where cos_S is constant."""
    cosines = _cosines(sums, block)
    if block.padding is not None:
        cosines.masked_fill_(block.padding, 0)
    centred, length = _centred(cosines, block.padding, sums.spare)
    return (centred / length[:, None]).masked_fill((length <= _CONSTANT)[:, None], 0)


EVALUATE: dict[str, Callable[[Sums, Block], Tensor]] = {
    "accuracy": accuracy,
    "mrr": reciprocal_rank,
    "similarity": similarity,
}


def _ordering(sums: Sums, block: Block) -> Tensor:
    """Numbers in the order of the cosines within each query, [m, k, q]; −∞ in padding.

    Without ε this is sign(D) D² / δ(j, j): the length of the query is common to its candidates, and squares need no
    root. Products of small whole numbers are exact, so equal cosines of such numbers are equal here.
    """
    if block.eps > 0:
        scores = _cosines(sums, block)
    else:
        scores = sums.dots
        torch.abs(scores, out=sums.spare)
        scores.mul_(sums.spare).div_(sums.squares)
        _no_gradient(scores, sums, block)
    if block.padding is not None:
        scores.masked_fill_(block.padding, -torch.inf)
    return scores


def _cosines(sums: Sums, block: Block) -> Tensor:
    lengths = torch.mul(sums.squares, sums.query_squares[:, None], out=sums.spare).sqrt_()
    scores = sums.dots.div_(lengths.add_(block.eps) if block.eps > 0 else lengths)
    _no_gradient(scores, sums, block)
    return scores


def _no_gradient(scores: Tensor, sums: Sums, block: Block) -> None:
    """0 where one of the two has no gradient."""
    if block.zeros:
        scores.masked_fill_(sums.squares == 0, 0).masked_fill_((sums.query_squares == 0)[:, None], 0)


def _centred(cosines: Tensor, padding: Tensor | None, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Deviations [m, k, q] from the mean over candidates, 0 in padding, and their length [m, q]."""
    count = cosines.shape[1] if padding is None else (~padding).sum(0)
    cosines.sub_((cosines.sum(1) / count)[:, None])
    if padding is not None:
        cosines.masked_fill_(padding, 0)
    return cosines, torch.square(cosines, out=spare).sum(1).sqrt_()
