"""Curvatures that are never formed: they go back to the model and the data for every product with a vector."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_influence.capture import Component, ExampleLoader, ExampleLoss, LayerRecord
from lightning_influence.capture.component import Select
from lightning_influence.capture.examples import TRAIN
from lightning_influence.capture.finite import NanPolicy, check_gradients, check_nan_policy, omit_nonfinite
from lightning_influence.curvature.base import Curvature, Fisher, check_fisher, loss_for
from lightning_influence.curvature.damping import check_damping, damping_of
from lightning_influence.curvature.products import PRODUCTS, CurvatureProduct, ProductKind
from lightning_influence.errors import NotFittedError, StoreError


@dataclass(frozen=True, eq=False)
class Convergence:
    """How far a call to a solver came, query by query.

    Attributes:
        residuals: ``|b - (G + damping I) x| / |b|`` after each step, float64 [steps + 1, q]; a query that is done
            keeps its last one. 0 for a gradient that is 0.
        steps: Steps that each query took, int64 [q].
        tolerance: What was asked for.
    """

    residuals: Tensor
    steps: Tensor
    tolerance: float

    @property
    def converged(self) -> Tensor:
        """Whether each query came down to the tolerance, up to a hundredth of it for rounding, bool [q]."""
        return self.residuals[-1] <= 1.01 * self.tolerance

    def __str__(self) -> str:
        """One line for a log."""
        q, done = len(self.steps), int(self.converged.sum())
        worst = f"largest residual {float(self.residuals[-1].max()):.2g} (tolerance {self.tolerance:.2g})"
        return f"{done} of {q} queries converged within {int(self.steps.max())} steps, {worst}"


class IterativeCurvature(Curvature):
    """The damped Gauss-Newton matrix or Hessian of the mean loss, all components together, by products with vectors.

    One pass over the data finds what a share of the mean eigenvalue is: the mean squared length of the example
    gradients is the trace of E[g g^T]. (It is the scale of the damping for the Hessian too, whose own trace may be
    negative.) Then `bind` hands over the model and the data, which `fit` does by itself. `precondition` inverts the
    whole matrix, `solve` one component's diagonal block, as if the others were fixed.

    The model is kept, not copied: solving refuses to go on when its weights have changed since.

    Args:
        damping: Absolute damping; None takes a share of the mean eigenvalue of the whole matrix.
        damping_share: That share.
        product: ``"gauss-newton"`` or ``"hessian"``, see `GaussNewtonProduct` and `HessianProduct`.
        fisher: Labels of the pass for the mean eigenvalue, ``"sampled"`` from the model or ``"empirical"``.
        seed: Of the sampled labels, and of what a member draws itself.

    Attributes:
        history: A `Convergence` for every call since the last fit.

    Raises:
        ValueError: If an argument is out of range.
    """

    num_passes = 1

    def __init__(
        self,
        damping: float | None = None,
        damping_share: float = 0.1,
        product: ProductKind = "gauss-newton",
        fisher: Fisher = "sampled",
        seed: int = 0,
    ) -> None:
        owner = type(self).__name__
        check_damping(owner, damping, damping_share)
        check_fisher(owner, fisher, seed)
        if product not in PRODUCTS:
            raise ValueError(f"`{owner}(product={product!r})`: expected one of {sorted(PRODUCTS)}.")
        self.damping, self.damping_share, self.product = damping, damping_share, product
        self.fisher, self.seed = fisher, seed
        self.history: list[Convergence] = []
        self._sums: dict[str, Tensor] = {}
        self._mean_eigenvalue: float | None = None
        self._product: CurvatureProduct | None = None

    def start(self, components: Sequence[Component]) -> None:
        """Begin the pass, letting go of a model that was bound before."""
        super().start(components)
        self.history, self._sums, self._mean_eigenvalue, self._product = [], {}, None, None

    def update(self, component: Component, record: LayerRecord) -> None:
        """Squared lengths of the gradients, summed in float64.

        Raises:
            ValueError: If one is not finite (ids are named).
        """
        if not self._sums:
            self._sums = {"squares": torch.zeros((), dtype=torch.float64), "examples": torch.tensor(0)}
        squares = record.squared_norms().double().cpu()
        check_gradients(record.ids, squares.isfinite(), f"examples by {component.name!r}")
        self._sums["squares"] += squares.sum()
        if component.name == self.components[0].name:
            self._sums["examples"] += len(record)

    def finish_pass(self) -> None:
        """Find the mean eigenvalue; `bind` makes the curvature fitted.

        Raises:
            ValueError: If no example was seen.
        """
        if not self._sums or not self._sums["examples"]:
            raise ValueError(
                f"`{type(self).__name__}.finish_pass()`: no gradient was seen; expected at least one example."
            )
        size = sum(c.numel for c in self.components)
        self._mean_eigenvalue = float(self._sums["squares"]) / float(self._sums["examples"]) / size
        self._sums = {}

    def bind(
        self,
        model: nn.Module,
        data: Any,
        loss: ExampleLoss | Callable[[nn.Module, Any], Tensor] | None = None,
        *,
        progress: bool = False,
    ) -> Self:
        """Hand over what products are taken of, after the pass over the data.

        Args:
            model: The model at the parameters of interest, kept by reference.
            data: A map-style dataset, or a DataLoader over one: the whole of it, on every rank.
            loss: Per-example loss; None resolves it.
            progress: Whether to show a progress bar when something takes more than a few seconds.

        Raises:
            NotFittedError: If the pass over the data is not finished.
        """
        if self._mean_eigenvalue is None:
            raise NotFittedError(f"`{type(self).__name__}.bind`: finish the pass over the data first, or call fit.")
        loader = ExampleLoader(data, what=TRAIN)
        self._take(PRODUCTS[self.product](model, self.components, loader, loss_for(model, loader, loss)), progress)
        self.fitted = True
        return self

    def fit(
        self,
        model: nn.Module,
        data: Any,
        loss: ExampleLoss | Callable[[nn.Module, Any], Tensor] | None = None,
        components: Select | list[Component] = None,
        *,
        batch_size: int | None = None,
        progress: bool = True,
        nan_policy: NanPolicy = "raise",
        memory_budget: int = 0,
        disk_budget: int = 0,
        scratch: str | os.PathLike[str] | None = None,
    ) -> Self:
        """One pass over the data for the scale of the damping, then `bind`; arguments as in `Curvature.fit`.

        There is no second pass that could use a budget of memory or disk.
        """
        check_nan_policy(f"{type(self).__name__}.fit", nan_policy)
        loader = ExampleLoader(data, batch_size, what=TRAIN)
        loss = loss_for(model, loader, loss)
        loader = omit_nonfinite(model, loader, loss) if nan_policy == "omit" else loader
        super().fit(model, loader, loss, components, progress=progress)
        return self.bind(model, loader, loss, progress=progress)

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``(G + damping I)^{-1}`` of the whole gradient, components together."""
        self._check_fitted()
        return self._by_component(self._apply(self.components, self._flat(gradients)), gradients)

    def multiply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``G V`` of the whole gradient, components together, by one pass over the data."""
        self._check_fitted()
        return self._by_component(self._block(self.components)(self._flat(gradients)), gradients)

    def solve(self, component: Component, gradients: Tensor) -> Tensor:
        """The same for the component's own diagonal block, as if the others were fixed."""
        self._check_fitted()
        return self._apply((component,), gradients.flatten(1)).reshape(gradients.shape)

    def partial(self) -> dict[str, Tensor]:
        """Squared lengths and count."""
        return self._sums

    def settings(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            "damping": self.damping,
            "damping_share": self.damping_share,
            "product": self.product,
            "fisher": self.fisher,
            "seed": self.seed,
        }

    def state(self) -> dict[str, Tensor]:
        """Always refused.

        Raises:
            NotFittedError: Before the data was seen.
            StoreError: There are no factors.
        """
        self._check_fitted()
        raise StoreError(self._no_state())

    def load_state(self, components: Sequence[Component], state: Mapping[str, Tensor]) -> None:
        """Always refused.

        Raises:
            StoreError: There are no factors.
        """
        raise StoreError(self._no_state())

    def to(self, device: torch.device | str) -> Self:
        """Nothing to move: products are made with the model, wherever that is."""
        return self

    @abstractmethod
    def _apply(self, components: Sequence[Component], vectors: Tensor) -> Tensor:
        """Solve for the block of some components: [q, P] -> [q, P], the components' gradients one after another."""

    def _take(self, product: CurvatureProduct, progress: bool) -> None:
        """Keep the product with the whole matrix, or what is needed of it."""
        self._product, self._progress = product, progress

    def _block(self, components: Sequence[Component]) -> CurvatureProduct:
        """The product with the block of some components, after a look at the weights."""
        assert self._product is not None
        self._product.check_weights()
        return self._product.restricted(components)

    @property
    def _damping(self) -> float:
        mean = torch.tensor(self._mean_eigenvalue, dtype=torch.float64)
        return damping_of(mean, self.damping, self.damping_share)

    def _report(self, found: Convergence, advice: str) -> None:
        """Remember how a call went, and say so when a query is not there."""
        self.history.append(found)
        if not bool(found.converged.all()):
            rows = (~found.converged).nonzero().flatten()[:8].tolist()
            name = type(self).__name__
            warnings.warn(f"{name}: {found}; rows {rows} are not solved to it. {advice}", stacklevel=4)

    def _no_state(self) -> str:
        return (
            f"{type(self).__name__} keeps no factors: it goes back to the model and the data for every query. "
            "Expected a curvature that can be stored, such as EKFAC(); otherwise fit it again where it is used."
        )
