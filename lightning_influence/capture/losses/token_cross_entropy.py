"""Cross-entropy of many tokens over a large vocabulary, in pieces that stay in a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_influence.capture.budget import at_once

PIECE = 1 << 17  # logits at a time: 512 KiB of float32


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus log-likelihood of each label; 0, without a gradient, where the label is negative.

    The numbers of ``torch.nn.functional.cross_entropy(..., reduction="none")``, which writes the log-probabilities of
    the whole vocabulary to memory and reads them again in the backward pass; with 8000 tokens that costs as much as
    the matrix product that made the logits. Here one number per token is kept. It can be differentiated twice.

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
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Slope.apply(gradient, *ctx.saved_tensors), None  # type: ignore[no-untyped-call]


class _Slope(torch.autograd.Function):
    """``w (p - e)``: weights w of the losses, softmax p, e the label. Its derivative is that of softmax."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, logits: Tensor, labels: Tensor, normaliser: Tensor) -> Tensor:
        out = torch.empty_like(logits, dtype=normaliser.dtype)
        weights = torch.where(labels >= 0, gradient, 0.0).unsqueeze(1)
        columns = labels.clamp_min(0).unsqueeze(1)
        for rows in _pieces(logits):
            part = torch.sub(logits[rows], normaliser[rows].unsqueeze(1), out=out[rows]).exp_()
            part.scatter_add_(1, columns[rows], part.new_full((len(part), 1), -1.0)).mul_(weights[rows])
        ctx.save_for_backward(out, weights, logits, labels, normaliser)
        return out.to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vector: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """``v -> (p - e) v`` for the weights and ``w (diag(p) - p p^T) v`` for the logits."""
        slope, weights, logits, labels, normaliser = ctx.saved_tensors
        columns = labels.clamp_min(0).unsqueeze(1)
        by_weight = torch.empty_like(normaliser) if ctx.needs_input_grad[0] else None
        by_logits = torch.empty_like(slope) if ctx.needs_input_grad[1] else None
        for rows in _pieces(slope):
            given, label = vector[rows].to(slope.dtype), columns[rows]
            if by_weight is not None:  # not from the slope: a weight may be 0
                chances = (logits[rows].to(slope.dtype) - normaliser[rows].unsqueeze(1)).exp_()
                found = (chances * given).sum(1) - given.gather(1, label).squeeze(1)
                by_weight[rows] = torch.where(labels[rows] >= 0, found, 0.0)
            if by_logits is not None:
                weighted = slope[rows].scatter_add(1, label, weights[rows])  # w p
                part = torch.mul(weighted, given, out=by_logits[rows])
                share = torch.where(weights[rows] == 0, 0.0, part.sum(1, keepdim=True) / weights[rows])
                part.sub_(weighted.mul_(share))
        return by_weight, None if by_logits is None else by_logits.to(logits.dtype), None, None


def _pieces(logits: Tensor) -> Iterator[slice]:
    step = max(1, at_once(PIECE, logits.device) // logits.shape[1])
    return (slice(k, k + step) for k in range(0, len(logits), step))
