"""Cross-entropy of many tokens over a large vocabulary, in pieces that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 1 << 17  # logits at a time: 512 KiB of float32


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus log-likelihood of each label; 0, without a gradient, where the label is negative.

    The numbers of ``torch.nn.functional.cross_entropy(..., reduction="none")``, which writes the log-probabilities of
    the whole vocabulary to memory and reads them again in the backward pass; with 8000 tokens that costs as much as
    the matrix product that made the logits. Here one number per token is kept. It can be differentiated once.

    Args:
        logits: [p, V].
        labels: int64 [p].

    Returns:
        [p], float32 (float64 for float64 logits).
    """
    return cast(Tensor, _TokenCrossEntropy.apply(logits, labels))  # type: ignore[no-untyped-call]


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        normaliser = torch.empty(len(logits), dtype=wide, device=logits.device)
        for rows in _pieces(logits):
            normaliser[rows] = torch.logsumexp(logits[rows].to(wide), dim=1)
        ctx.save_for_backward(logits, labels, normaliser)
        picked = logits.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
        return torch.where(labels >= 0, normaliser - picked, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels, normaliser = ctx.saved_tensors
        out = torch.empty_like(logits, dtype=normaliser.dtype)
        weights = torch.where(labels >= 0, gradient, 0.0).unsqueeze(1)
        columns = labels.clamp_min(0).unsqueeze(1)
        for rows in _pieces(logits):
            part = torch.sub(logits[rows], normaliser[rows].unsqueeze(1), out=out[rows]).exp_()
            part.scatter_add_(1, columns[rows], part.new_full((len(part), 1), -1.0)).mul_(weights[rows])
        return out.to(logits.dtype), None


def _pieces(logits: Tensor) -> Iterator[slice]:
    step = max(1, PIECE // logits.shape[1])
    return (slice(k, k + step) for k in range(0, len(logits), step))
