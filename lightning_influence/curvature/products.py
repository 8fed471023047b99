"""Products of a model's curvature with vectors, exact and without the matrix ([MS] section 5.1; Pearlmutter 1994)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_influence.capture import Component, ExampleLoader, ExampleLoss, parameter_gradients
from lightning_influence.capture.batches import map_tensors, to_device
from lightning_influence.capture.examples import TRAIN
from lightning_influence.capture.forward import runnable
from lightning_influence.capture.layers.base import widened
from lightning_influence.capture.unfit import run_batch
from lightning_influence.curvature.base import loss_for
from lightning_influence.curvature.differentiation import (
    cut_off,
    differentiated,
    has_dead_end,
    signature,
    tracked_ones,
)

ProductKind: TypeAlias = Literal["gauss-newton", "hessian"]


class CurvatureProduct(ABC):
    """``V -> (1/n) Σ_i M_i V`` for the second-order matrix M_i of each example's own loss.

    Vectors are rows [q, P]: the components' gradients one after another, each flattened. All rows share one pass over
    the data, and one forward pass per batch. Derivatives by other parameters are not formed. The model runs in
    evaluation mode, without autocast and with the plain formula of attention (the fused ones have no second
    derivative), and is left as it was. Sums are in the dtype of the vectors.

    Args:
        model: The model at the parameters of interest.
        components: Components of it, from `find_components`.
        data: A map-style dataset, or a DataLoader over one.
        loss: Per-example loss; None resolves it.

    Attributes:
        size: P.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        components: Sequence[Component],
        data: Any,
        loss: ExampleLoss | Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.components = tuple(components)
        self.loader = ExampleLoader(data, what=TRAIN)
        self.loss = loss_for(model, self.loader, loss).where_supervised()
        self._seen = signature(model)
        self._graph_checked = False

    @property
    def size(self) -> int:
        """Number of parameters P."""
        return sum(c.numel for c in self.components)

    @property
    def like(self) -> Tensor:
        """An empty tensor with the device of the components and the dtype in which their gradients are kept."""
        return widened(self.model.get_parameter(self.components[0].parameters[0]).detach().new_empty(0))

    def restricted(self, components: Sequence[Component]) -> Self:
        """The diagonal block of some of the components."""
        twin = copy.copy(self)
        twin.components = tuple(components)
        return twin

    def on(self, ids: Sequence[int]) -> Self:
        """The mean over some of the examples."""
        twin = copy.copy(self)
        twin.loader = ExampleLoader(self.loader, indices=ids)
        return twin

    def check_weights(self) -> None:
        """Refuse to go on with another model than at first.

        Raises:
            ValueError: If a parameter or buffer has changed since.
        """
        for (name, before), (_, now) in zip(self._seen, signature(self.model), strict=True):
            if not torch.allclose(before, now, rtol=1e-10, atol=0.0, equal_nan=True):
                raise ValueError(
                    f"{type(self.model).__name__}.{name} has changed since the curvature was fitted, and products "
                    "would be those of other weights. Fit the curvature again, or load the weights it was fitted on."
                )

    def __call__(self, vectors: Tensor) -> Tensor:
        """[q, P] -> [q, P].

        Raises:
            ValueError: If a loss or a derivative is not finite (ids are named), or the model or the loss cannot be
                differentiated twice.
        """
        names = [name for c in self.components for name in c.parameters]
        with differentiated(self.model, names) as parameters:
            rows = self._unpacked(vectors.clone() if vectors.is_inference() else vectors)
            totals = [torch.zeros_like(row) for row in rows]
            for ids, batch in self.loader:
                self._add_batch(totals, ids, batch, parameters, rows)
            return self._packed(totals) / self.loader.num_examples

    @abstractmethod
    def _products(
        self, ids: Tensor, batch: Any, parameters: list[Tensor], rows: list[Tensor]
    ) -> Iterator[Sequence[Tensor]]:
        """For each of the q vectors, the summed products by parameter; ``rows`` are [q, *parameter.shape]."""

    def _add_batch(
        self, totals: list[Tensor], ids: Tensor, batch: Any, parameters: list[Tensor], rows: list[Tensor]
    ) -> None:
        """Add the products of a batch to ``totals``, one vector after another, as they are large."""
        batch = to_device(batch, parameters[0].device)
        batch = map_tensors(batch, lambda t: t.clone() if t.is_inference() else t)
        rows = [row.to(p) for row, p in zip(rows, parameters, strict=True)]
        try:
            for q, parts in enumerate(self._products(ids, batch, parameters, rows)):
                for total, part in zip(totals, parts, strict=True):
                    # A sum reads once, a look at every number writes as well; it is taken where the sum is none.
                    if not bool(part.sum().isfinite()) and not bool(part.isfinite().all()):
                        raise ValueError(self._wild(ids))
                    total[q].add_(part)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise ValueError(self._once(str(error))) from error

    def _wild(self, ids: Tensor) -> str:
        return (
            f"`{type(self).__name__}`: second derivatives of a batch are not finite (ids {ids[:8].tolist()}); expected "
            "finite ones. Remove these examples or repair the model."
        )

    def _check_graph(self, tensors: Sequence[Tensor]) -> None:
        """Look through the graph of first derivatives, once, for operations that have no further ones.

        Autograd does not follow them where nothing beneath is asked for, and the product would lack their part.
        """
        if not self._graph_checked and has_dead_end(tensors):
            raise ValueError(self._once("an operation in it is marked once_differentiable"))
        self._graph_checked = True

    def _once(self, reason: str) -> str:
        return (
            f"`{type(self).__name__}`: {type(self.model).__name__} or its loss ({type(self.loss).__name__}) cannot be "
            f"differentiated twice: {reason}. Expected operations with second derivatives, for example "
            "attn_implementation='sdpa'; EKFAC() needs first derivatives only."
        )

    def _losses(self, ids: Tensor, batch: Any) -> Tensor:
        """[n], checked."""
        values = run_batch(lambda batch: self.loss.losses(self.model, batch), batch, ids, self.loader.what)
        if tuple(values.shape) != (len(ids),):
            raise ValueError(
                f"the loss of a batch of {len(ids)} examples has shape {tuple(values.shape)}; expected one loss per "
                f"example, [{len(ids)}]."
            )
        bad = ids[~torch.isfinite(values.detach()).cpu()]
        if len(bad):
            raise ValueError(
                f"the loss of {len(bad)} of {len(ids)} examples is not finite (ids {bad[:8].tolist()}); expected "
                "finite losses. Remove these examples or repair the model."
            )
        return values

    def _unpacked(self, vectors: Tensor) -> list[Tensor]:
        """[q, P] -> by parameter [q, *parameter.shape]."""
        blocks = torch.split(vectors, [c.numel for c in self.components], dim=1)
        found: list[Tensor] = []
        for component, block in zip(self.components, blocks, strict=True):
            parts = parameter_gradients(self.model, component, block.reshape(-1, *component.shape))
            found += [parts[name] for name in component.parameters]
        return found

    def _packed(self, rows: list[Tensor]) -> Tensor:
        """By parameter -> [q, P]: the adjoint of taking apart, which only moves numbers."""
        zeros = rows[0].new_zeros(len(rows[0]), self.size)
        [found] = torch.autograd.grad(self._unpacked(zeros.requires_grad_()), [zeros], rows)
        return found


class HessianProduct(CurvatureProduct):
    """``∇² ℓ_i`` of any loss that can be differentiated twice; it may have negative eigenvalues."""

    kind = "hessian"

    def _products(
        self, ids: Tensor, batch: Any, parameters: list[Tensor], rows: list[Tensor]
    ) -> Iterator[Sequence[Tensor]]:
        values = self._losses(ids, batch)
        gradients = torch.autograd.grad(
            values, parameters, tracked_ones(values), create_graph=True, allow_unused=True, materialize_grads=True
        )
        self._check_graph(gradients)
        curved = [k for k, gradient in enumerate(gradients) if gradient.requires_grad]
        for q in range(len(rows[0])):
            if curved:
                yield torch.autograd.grad(
                    [gradients[k] for k in curved],
                    parameters,
                    [rows[k][q] for k in curved],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            else:  # linear in all of them
                yield [torch.zeros_like(p) for p in parameters]


class GaussNewtonProduct(CurvatureProduct):
    """``J_i^T (∇²_z ℓ_i) J_i``, J_i the Jacobian of what the model returns for example i, its logits or predictions z.

    Positive semi-definite when the loss is convex in z, as all losses of this package are. There ``∇²_z ℓ`` is the
    covariance ``diag(p) - p p^T`` of softmax outputs p (at every supervised position; times 1/T where the loss is a
    mean over T of them) or the identity of the half squared error: no label enters. With ``reduction="sum"`` it is
    the Fisher information under the model's own distribution, E[g g^T] over all labels, which sampled labels estimate
    (with ``"mean"`` that one has 1/T² where this has 1/T). For a loss of the user's own, z is what the model's
    ``forward`` returns, and the loss may depend on the parameters through it only.
    """

    kind = "gauss-newton"

    def _products(
        self, ids: Tensor, batch: Any, parameters: list[Tensor], rows: list[Tensor]
    ) -> Iterator[Sequence[Tensor]]:
        outputs, cut, values = self._cut(ids, batch, parameters)
        [slope] = torch.autograd.grad(values, [cut], tracked_ones(values), create_graph=True)
        # J v is the derivative by u of the linear u -> J^T u, which one graph gives for all v.
        dual = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, parameters, dual, create_graph=True, allow_unused=True)
        used = [k for k, gradient in enumerate(pulled) if gradient is not None]
        self._check_graph([slope, *(pulled[k] for k in used)])
        for q in range(len(rows[0])):
            [pushed] = torch.autograd.grad(
                [pulled[k] for k in used], [dual], [rows[k][q] for k in used], retain_graph=True
            )
            [curved] = torch.autograd.grad(slope, [cut], pushed, retain_graph=True, allow_unused=True)
            if curved is None:
                raise ValueError(
                    f"`GaussNewtonProduct`: the loss ({type(self.loss).__name__}) is linear in what the model returns, "
                    "so its Gauss-Newton matrix is 0. Let forward return logits or predictions, or ask for the Hessian."
                )
            yield torch.autograd.grad(
                outputs, parameters, curved, retain_graph=True, allow_unused=True, materialize_grads=True
            )

    def _cut(self, ids: Tensor, batch: Any, parameters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs as functions of the parameters, their cut-off copy, and the losses as functions of that."""
        network, calls = runnable(self.model), []

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            calls.append(cut_off(output))
            return calls[-1][2]

        handle = network.register_forward_hook(hook)
        try:
            values = self._losses(ids, batch)
        finally:
            handle.remove()
        if len(calls) != 1:
            raise ValueError(
                f"`GaussNewtonProduct`: the loss called {type(network).__name__} {len(calls)} times; expected once, so "
                "that its outputs are known. Call the module itself in example_losses, or ask for the Hessian."
            )
        outputs, cut, _ = calls[0]
        beside = values.requires_grad and any(
            gradient is not None
            for gradient in torch.autograd.grad(values.sum(), parameters, retain_graph=True, allow_unused=True)
        )
        if beside or not (values.requires_grad and outputs.requires_grad):
            state = "depends on the parameters not only" if beside else "does not depend on the parameters"
            raise ValueError(
                f"`GaussNewtonProduct`: the loss ({type(self.loss).__name__}) {state} through what "
                f"{type(network).__name__} returns; expected a loss of its logits or predictions, without further "
                "terms and not detached. Ask for the Hessian otherwise."
            )
        return outputs, cut, values


PRODUCTS: dict[str, type[CurvatureProduct]] = {p.kind: p for p in (GaussNewtonProduct, HessianProduct)}
