"""Dense second-order matrices in float64, one example and one entry at a time; nothing here imports the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def hessian(parameters: Sequence[Tensor], losses: Sequence[Callable[[], Tensor]]) -> Tensor:
    """Mean over examples of the Hessian of each loss by all parameters, [P, P]."""
    return torch.stack([_second(parameters, loss) for loss in losses]).mean(0)


def gauss_newton(
    parameters: Sequence[Tensor], outputs: Sequence[Callable[[], Tensor]], curve: Callable[[Tensor], Tensor]
) -> Tensor:
    """Mean over examples of Jᵀ C(z) J, for outputs z [k] of one example and C(z) [k, k]."""
    total = torch.zeros(())
    for output in outputs:
        z = output()
        rows = [torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in z]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        total = total + jacobian.T @ curve(z.detach()) @ jacobian
    return total / len(outputs)


def softmax_curve(z: Tensor) -> Tensor:
    """diag(p) − ppᵀ for every row of logits [t · C] of C classes, block by block."""
    p = torch.softmax(z, 0)
    return torch.diag(p) - torch.outer(p, p)


def _second(parameters: Sequence[Tensor], loss: Callable[[], Tensor]) -> Tensor:
    first = torch.autograd.grad(loss(), parameters, create_graph=True, materialize_grads=True)
    slope = torch.cat([part.flatten() for part in first])
    rows = []
    for entry in slope:
        if entry.requires_grad:
            row = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        else:
            row = tuple(torch.zeros_like(p) for p in parameters)
        rows.append(torch.cat([part.flatten() for part in row]))
    return torch.stack(rows)
