"""Gauss-Newton matrices of single examples as sums of outer products, one for each output of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.capture import ExampleLoss
from lightning_influence.capture.forward import runnable
from lightning_influence.capture.layers.base import widened
from lightning_influence.curvature.differentiation import cut_off, tracked_ones

LIMIT = 128  # outputs: so many passes over the data, and so many gradients for each example


class OutputFactors:
    """Losses ``⟨L_k, z_i⟩`` of outputs z_i [o], with gradients ĝ_ik so that ``Σ_k ĝ_ik ĝ_ik^T = J_i^T (∇²_z ℓ_i) J_i``.

    ``L L^T = ∇²_z ℓ_i`` and J_i is the Jacobian of the outputs: the sum is the exact Gauss-Newton matrix of the
    example, which gradients under sampled labels give on average only. It takes o backward passes, and no label enters.

    Args:
        loss: Per-example loss, a function of the model's outputs [n] or [n, o] row by row, convex in them.
    """

    def __init__(self, loss: ExampleLoss) -> None:
        self.loss = loss

    def count(self, model: nn.Module, batch: Any) -> int:
        """Number of outputs o.

        Raises:
            ValueError: If the outputs are not [n] or [n, o] with few o.
        """
        with torch.no_grad():
            outputs, _, _ = self._cut(model, batch)
        return outputs.shape[1] if outputs.dim() == 2 else 1

    def losses(self, k: int) -> Callable[[nn.Module, Any], Tensor]:
        """The k-th of them, as `GradientCapture.record` takes it: (model, batch) -> [n].

        Raises:
            ValueError: From the function, if the loss is not convex in the outputs.
        """

        def losses(model: nn.Module, batch: Any) -> Tensor:
            outputs, cut, values = self._cut(model, batch)
            root = self._root(cut, values)
            return (outputs.reshape(len(outputs), -1) * root[:, :, k]).sum(1)

        return losses

    def _root(self, cut: Tensor, values: Tensor) -> Tensor:
        """L [n, o, o] in float32 at least, columns by falling eigenvalue."""
        [slope] = torch.autograd.grad(values, [cut], tracked_ones(values), create_graph=True)
        columns = [
            torch.autograd.grad(part.sum(), cut, retain_graph=True, materialize_grads=True, allow_unused=True)[0]
            for part in slope.reshape(len(slope), -1).unbind(1)
        ]
        hessian = torch.stack([column.reshape(len(slope), -1) for column in columns], dim=2).detach()
        spectrum, basis = torch.linalg.eigh(widened((hessian + hessian.mT) / 2))
        rounding = 100 * torch.finfo(hessian.dtype).eps * spectrum.abs().amax(1, keepdim=True)
        if bool((spectrum < -rounding).any()):
            raise ValueError(
                f"the loss ({type(self.loss).__name__}) is not convex in what the model returns, so its Gauss-Newton "
                "matrix is no sum of outer products. Expected a convex one, or group_curvature='sampled'."
            )
        root: Tensor = basis * spectrum.clamp_min(0).sqrt()[:, None, :]
        return root.flip(2)

    def _cut(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, their copy that begins a graph of its own, and the losses as functions of that."""
        network, calls = runnable(model), []

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            calls.append(cut_off(output))
            return calls[-1][2]

        handle = network.register_forward_hook(hook)
        try:
            values = self.loss.losses(model, batch)
        finally:
            handle.remove()
        if len(calls) != 1:
            raise ValueError(
                f"the loss ({type(self.loss).__name__}) called {type(network).__name__} {len(calls)} times; expected "
                "once, so that its outputs are known."
            )
        outputs, cut, _ = calls[0]
        if outputs.dim() not in (1, 2) or (outputs.dim() == 2 and outputs.shape[1] > LIMIT):
            raise ValueError(
                f"{type(network).__name__} returns outputs of shape {tuple(outputs.shape)}; expected [n] or [n, o] "
                f"with o <= {LIMIT}, for an exact Gauss-Newton matrix of every example. Use group_curvature='sampled'."
            )
        return outputs, cut, values
