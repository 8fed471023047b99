"""The contract of second-order information: accumulated over records in passes, applied by solving."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import Self

from lightning_influence.capture import (
    Component,
    ExampleLoader,
    ExampleLoss,
    GradientCapture,
    LayerRecord,
    resolve_loss,
)
from lightning_influence.capture.batches import to_device
from lightning_influence.capture.component import Select
from lightning_influence.capture.sampling import Uniforms
from lightning_influence.errors import NotFittedError

Fisher: TypeAlias = Literal["sampled", "empirical"]


class Curvature(ABC):
    """A damped approximation of G, the Fisher information of the per-example losses.

    One scale everywhere: G = E[g g^T] over examples, g the gradient of one example's own loss (summed over its
    positions). It is the Hessian of the mean loss as far as the Gauss-Newton approximation goes.
    """

    num_passes: ClassVar[int] = 0
    fisher: Fisher = "sampled"
    seed: int = 0
    components: tuple[Component, ...] = ()
    fitted: bool = False

    def start(self, components: Sequence[Component]) -> None:
        """Begin the first pass, forgetting what was seen before.

        Raises:
            ValueError: If the components are more than the curvature can hold.
        """
        self.components = tuple(components)
        self.fitted = self.num_passes == 0

    @abstractmethod
    def update(self, component: Component, record: LayerRecord) -> None:
        """Take in the gradients of one component for one batch of the current pass."""

    @abstractmethod
    def finish_pass(self) -> None:
        """End a pass over the data; after the last one the curvature is fitted.

        Raises:
            ValueError: If nothing was seen in this pass.
        """

    @abstractmethod
    def solve(self, component: Component, gradients: Tensor) -> Tensor:
        """``(G + damping I)^{-1} V`` for the block of one component: [q, *shape] -> [q, *shape].

        Raises:
            NotFittedError: Before the last pass is finished.
        """

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`solve` for all components, by name. Curvatures that couple components override it."""
        self._check_fitted()
        return {c.name: self.solve(c, gradients[c.name]) for c in self.components}

    def partial(self) -> dict[str, Tensor]:
        """The sums of the current pass, to be added up over parts of the data (ranks) in place.

        Every part needs the total before it calls `finish_pass`, so that all go on from the same numbers.
        """
        return {}

    def merge(self, others: Sequence[Self]) -> None:
        """Add what others saw in the current pass on other parts of the data.

        Raises:
            ValueError: If one of the parts saw other components than this one, or nothing.
        """
        sums = self.partial()
        for other in others:
            found = other.partial()
            if found.keys() != sums.keys():
                odd = sorted(sums.keys() ^ found.keys())
                raise ValueError(
                    f"`{type(self).__name__}.merge`: only one of two parts has {odd[:4]}; expected parts in the same "
                    "pass, with the same components and at least one example each."
                )
            for key, value in found.items():
                sums[key].add_(value.to(sums[key].device))

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Constructor arguments, JSON-like: ``type(c)(**c.settings())`` is an unfitted twin."""

    def state(self) -> dict[str, Tensor]:
        """What was fitted, as named tensors."""
        return {}

    def load_state(self, components: Sequence[Component], state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.components = tuple(components)
        self.fitted = True

    def fit(
        self,
        model: nn.Module,
        data: Any,
        loss: ExampleLoss | Callable[[nn.Module, Any], Tensor] | None = None,
        components: Select | list[Component] = None,
        *,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> Self:
        """Accumulate over a dataset: `num_passes` forward and backward passes without weight gradients.

        Args:
            model: The model at the parameters of interest. Left as it was.
            data: A map-style dataset, or a DataLoader over one (its batch size and collate function are used).
            loss: Per-example loss; None resolves it from the model and the first batch.
            components: What `find_components` takes.
            batch_size: Examples per batch; None takes the loader's, or 32.
            progress: Whether to show a progress bar when it takes more than a few seconds.

        Returns:
            Itself, fitted.

        Raises:
            ValueError: If the data is empty, or a loss is not one finite number per example (ids are named).
            UnsupportedLayerError: If a component has no per-example gradient.
        """
        loader = ExampleLoader(data, batch_size)
        loss = loss_for(model, loader, loss)
        with GradientCapture(model, components) as capture:
            self.start(capture.components)
            for k in range(self.num_passes):
                label = f"{type(self).__name__} pass {k + 1} of {self.num_passes}"
                for ids, batch in tqdm(loader, desc=label, delay=3, leave=False, disable=not progress):
                    self.observe(capture, ids, batch, loss)
                self.finish_pass()
        return self

    def observe(
        self,
        capture: GradientCapture,
        ids: Tensor,
        batch: Any,
        loss: ExampleLoss | Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        """Take in one batch of the current pass.

        Labels depend on the seed and the example's id only, so both passes see the same ones and the result
        does not depend on batch size, order or sharding.

        Args:
            capture: An active capture of the components that the curvature was started with.
            ids: Ids of the examples, int64 [n].
            batch: The batch, on any device.
            loss: Per-example loss; None resolves it from this batch.
        """
        batch = to_device(batch, next(capture.model.parameters()).device)
        found = resolve_loss(capture.model, batch, loss)

        def losses(model: nn.Module, batch: Any) -> Tensor:
            if self.fisher == "empirical":
                return found.losses(model, batch)
            return found.sampled_losses(model, batch, Uniforms(ids, self.seed))

        n = found.batch_size(batch)
        records = capture.record(batch, losses, ids, found.position_mask(batch), n)
        for component, record in zip(capture.components, records, strict=True):
            self.update(component, record)

    def __repr__(self) -> str:
        """How to build an unfitted twin."""
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise NotFittedError(
                f"{type(self).__name__} has not seen its data yet: call fit(model, data), or read it from a store."
            )


def loss_for(
    model: nn.Module, loader: ExampleLoader, loss: ExampleLoss | Callable[[nn.Module, Any], Tensor] | None
) -> ExampleLoss:
    """The loss given, or the one that the first batch of a dataset asks for, for all of its batches.

    A later batch may not tell: a single regression target of 1.0 could be a class as well.
    """
    _, batch = next(iter(loader))
    return resolve_loss(model, batch, loss)


def check_fisher(owner: str, fisher: str, seed: int) -> None:
    """Refuse an unknown kind of Fisher information, or a seed that is none.

    Raises:
        ValueError: Unless ``fisher`` is ``"sampled"`` or ``"empirical"``, and ``seed`` an int.
    """
    if fisher not in ("sampled", "empirical"):
        raise ValueError(
            f"`{owner}(fisher={fisher!r})`: expected 'sampled' (labels drawn from the model, the Gauss-Newton "
            "matrix in expectation) or 'empirical' (the data's own labels)."
        )
    if type(seed) is not int:
        raise ValueError(f"`{owner}(seed={seed!r})`: expected an int.")


def symmetric(matrix: Tensor) -> Tensor:
    """Float64 with rounding asymmetry removed, as the eigensolvers assume."""
    matrix = matrix.to(torch.float64)
    return (matrix + matrix.mT) / 2
