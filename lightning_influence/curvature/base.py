"""The contract of second-order information: accumulated over records in passes, applied by solving."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

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
from lightning_influence.capture.examples import TRAIN
from lightning_influence.capture.finite import NanPolicy, check_gradients, check_nan_policy, omit_nonfinite
from lightning_influence.capture.sampling import Uniforms
from lightning_influence.curvature.kept import KeptRecords
from lightning_influence.curvature.weights import Weights, changed, weights_of
from lightning_influence.errors import NotFittedError

Fisher: TypeAlias = Literal["sampled", "empirical"]
Loss: TypeAlias = ExampleLoss | Callable[[nn.Module, Any], Tensor] | None


class NonFiniteSums(ValueError):
    """What was added up over the data is no number."""


class Curvature(ABC):
    """A damped approximation of G, the Fisher information of the per-example losses.

    One scale everywhere: G = E[g g^T] over examples, g the gradient of one example's own loss (summed over its
    positions). It is the Hessian of the mean loss as far as the Gauss-Newton approximation goes.

    Attributes:
        omitted: Ids of the examples that `fit` left out because it was asked to.
    """

    num_passes: int = 0
    fisher: Fisher = "sampled"
    seed: int = 0
    components: tuple[Component, ...] = ()
    fitted: bool = False
    omitted: tuple[int, ...] = ()
    _weights: Weights = MappingProxyType({})

    def start(self, components: Sequence[Component]) -> None:
        """Begin the first pass, forgetting what was seen before.

        Raises:
            ValueError: If the components are more than the curvature can hold.
        """
        self.components = tuple(components)
        self.fitted, self._weights = self.num_passes == 0, {}

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

    def rotated(self, component: Component, record: LayerRecord) -> Tensor:
        """Gradients in the coordinates of `precondition_rotated`, an orthonormal basis of their space: [n, *shape].

        As they are, unless a curvature has a basis of its own that is quicker reached from a record.
        """
        return record.example_gradients()

    def precondition_rotated(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`precondition` of what `rotated` gave, or of linear combinations of it."""
        return self.precondition(gradients)

    def whitened_size(self, component: Component) -> int:
        """Numbers r_c that `whiten` gives for each example.

        Raises:
            ValueError: If the curvature is known by its products or solutions alone.
        """
        raise ValueError(
            f"`{type(self).__name__}.whiten`: a curvature that is known by its products alone has no square root. "
            "Expected EKFAC(), KFAC(), Diagonal(), ProjectedGram(), Exact() or Identity()."
        )

    def whiten(self, component: Component, record: LayerRecord) -> Tensor:
        """``(G + damping I)^{-1/2} g`` for the block of one component, in an orthonormal basis of its own: [n, r_c].

        So that ``<whiten(g), whiten(g')> = <g, solve(g')>``.

        Raises:
            ValueError: As `whitened_size`.
            NotFittedError: Before the last pass is finished.
        """
        self.whitened_size(component)  # says why there is none
        raise NotImplementedError(f"{type(self).__name__} defines `whitened_size` and has to define `whiten` with it.")

    def whitened(self, records: Iterable[tuple[Component, LayerRecord]]) -> Tensor:
        """`whiten` for all components of a batch, side by side: [n, r]. Curvatures that couple them override it."""
        return torch.cat([self.whiten(component, record) for component, record in records], dim=1)

    @abstractmethod
    def multiply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``G V`` without damping, by component: each [q, *shape] -> [q, *shape].

        Raises:
            NotFittedError: Before the last pass is finished.
        """

    def partial(self) -> dict[str, Tensor]:
        """The sums of the current pass, to be added up over parts of the data (ranks) in place.

        Every part needs the total before it calls `finish_pass`, so that all go on from the same numbers.
        """
        return {}

    def decompose(self, rank: int, ranks: int) -> dict[str, Tensor]:
        """Do one rank's share of the work of `finish_pass`, between the adding up of `partial` and that call.

        Optional: what is returned has to be added up over all ranks in place, as the sums were; without it every rank
        does all of the work.

        Args:
            rank: Of this process, from 0.
            ranks: How many there are.
        """
        return {}

    def needed(self, ids: Sequence[int]) -> list[int]:
        """Those of some examples that the current pass has to see; the others may be left out."""
        return list(ids)

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
        self.fitted, self._weights = True, {}

    def to(self, device: torch.device | str) -> Self:
        """Move what was fitted, in place as `nn.Module.to` does; estimators take it to their model by themselves."""
        goal, state, weights = torch.empty(0, device=device).device, self.state() if self.fitted else {}, self._weights
        if any(tensor.device != goal for tensor in state.values()):
            self.load_state(self.components, {name: tensor.to(goal) for name, tensor in state.items()})
            self._weights = weights
        return self

    def fit(
        self,
        model: nn.Module,
        data: Any,
        loss: Loss = None,
        components: Select | list[Component] = None,
        *,
        batch_size: int | None = None,
        progress: bool = True,
        nan_policy: NanPolicy = "raise",
        memory_budget: int = 0,
        disk_budget: int = 0,
        scratch: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Accumulate over a dataset: `num_passes` forward and backward passes without weight gradients.

        Args:
            model: The model at the parameters of interest. Left as it was.
            data: A map-style dataset, or a DataLoader over one (its batch size and collate function are used).
            loss: Per-example loss; None resolves it from the model and the first batch.
            components: What `find_components` takes.
            batch_size: Examples per batch; None takes the loader's, or 32.
            progress: Whether to show a progress bar when it takes more than a few seconds.
            nan_policy: What to do about examples whose loss is not finite: ``"raise"`` an error that names them, or
                ``"omit"`` them with a warning, see `omit_nonfinite`; ``omitted`` holds their ids.
            memory_budget: Bytes for the layers' inputs and gradients of the first pass that are kept where there is a
                second one, which then needs no forward and backward pass of these examples. The result is the same.
            disk_budget: Bytes for those that are kept in temporary files, once the memory is used up. Per position of
                an example they take as many numbers as the components have inputs and outputs; a disk reads and
                writes them sooner than a processor makes them again, while a GPU may be the faster one.
            scratch: Folder for these files; None takes the system's for temporary files.

        Returns:
            Itself, fitted.

        Raises:
            ValueError: If the data is empty, the model cannot be run on an example or its loss is not one finite number
                (ids are named), or the disk has less room than its budget.
            UnsupportedLayerError: If a component has no per-example gradient.
        """
        check_nan_policy(f"{type(self).__name__}.fit", nan_policy)
        loader = ExampleLoader(data, batch_size, what=TRAIN)
        loss = loss_for(model, loader, loss)
        loader = omit_nonfinite(model, loader, loss) if nan_policy == "omit" else loader
        kept = KeptRecords(memory_budget, disk_budget, scratch)
        with kept, GradientCapture(model, components) as capture:
            self.start(capture.components)
            self.omitted = loader.omitted
            for k in range(self.num_passes):
                self.see_again(kept)
                label = f"{type(self).__name__} pass {k + 1} of {self.num_passes}"
                bar = tqdm(self._to_see(loader, kept), desc=label, delay=3, leave=False, disable=not progress)
                keep = kept if k + 1 < self.num_passes else None
                for ids, batch in bar:
                    self.observe(capture, ids, batch, loss, keep=keep, what=loader.what)
                self.close_pass(capture, loader, loss)
            self._weights = weights_of(model, self.components) if self.num_passes else {}
        return self

    def observe(
        self,
        capture: GradientCapture,
        ids: Tensor,
        batch: Any,
        loss: Loss = None,
        *,
        keep: KeptRecords | None = None,
        what: str = TRAIN,
    ) -> None:
        """Take in one batch of the current pass.

        Labels depend on the seed and the example's id only, so both passes see the same ones and the result
        does not depend on batch size, order or sharding.

        Args:
            capture: An active capture of the components that the curvature was started with.
            ids: Ids of the examples, int64 [n].
            batch: The batch, on any device.
            loss: Per-example loss; None resolves it from this batch.
            keep: Where to keep the records for the next pass.
            what: What to call the examples in an error.

        Raises:
            ValueError: If the model cannot be run on examples, or a loss is not one finite number (ids are named).
        """
        records = self._records(capture, ids, batch, loss, what)
        records = records if keep is None else keep.keeping(records)
        for component, record in zip(capture.components, records, strict=True):
            self.update(component, record)

    def see_again(self, kept: KeptRecords) -> None:
        """Take in what `observe` kept of the pass before."""
        for records in kept:
            for component, record in zip(self.components, records, strict=True):
                self.update(component, record)

    def close_pass(
        self,
        capture: GradientCapture,
        examples: ExampleLoader,
        loss: Loss = None,
    ) -> None:
        """`finish_pass`; where it fails for numbers that are none, a look for the examples that are to blame.

        Args:
            capture: As in `observe`.
            examples: Those of the pass.
            loss: As in `observe`.

        Raises:
            ValueError: As `finish_pass`, with the ids of examples whose gradient is not finite.
        """
        try:
            self.finish_pass()
        except NonFiniteSums:
            for ids, batch in examples:
                records = self._records(capture, ids, batch, loss, examples.what)
                for component, record in zip(capture.components, records, strict=True):
                    check_gradients(ids, record.squared_norms().isfinite(), f"examples by {component.name!r}")
            raise

    def _records(
        self, capture: GradientCapture, ids: Tensor, batch: Any, loss: Loss, what: str
    ) -> Iterator[LayerRecord]:
        batch = to_device(batch, next(capture.model.parameters()).device)
        found = resolve_loss(capture.model, batch, loss)

        def losses(model: nn.Module, batch: Any) -> Tensor:
            if self.fisher == "empirical":
                return found.losses(model, batch)
            return found.sampled_losses(model, batch, Uniforms(ids, self.seed))

        return capture.record(batch, losses, ids, found.position_mask(batch), found.batch_size(batch), what)

    def changed(self, model: nn.Module) -> list[str]:
        """Parameters of a model that are not what `fit` saw; none where that is not known, as of a curvature read."""
        return changed(self._weights, weights_of(model, self.components)) if self._weights else []

    def __repr__(self) -> str:
        """How to build an unfitted twin."""
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"

    def _to_see(self, loader: ExampleLoader, kept: KeptRecords) -> ExampleLoader | list[Any]:
        """The batches of the current pass that were not kept."""
        needed = self.needed(loader.ids)
        if not needed:
            raise ValueError(
                f"`{self!r}.fit(data)`: none of {loader.num_examples} examples was drawn. Expected a larger "
                "covariance_share, or more examples."
            )
        known = kept.ids
        rest = [k for k in needed if k not in known]
        return ExampleLoader(loader, indices=rest) if rest else []

    def _flat(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """[q, P]: the components one after another."""
        return torch.cat([gradients[c.name].flatten(1) for c in self.components], dim=1)

    def _by_component(self, rows: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[q, P] in the shapes and dtypes of ``like``."""
        parts = torch.split(rows, [c.numel for c in self.components], dim=1)
        names = (c.name for c in self.components)
        return {name: part.reshape(like[name].shape).to(like[name]) for name, part in zip(names, parts, strict=True)}

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise NotFittedError(
                f"{type(self).__name__} has not seen its data yet: call fit(model, data), or read it from a store."
            )


def loss_for(model: nn.Module, loader: ExampleLoader, loss: Loss) -> ExampleLoss:
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
