"""What curvatures without terms between components share: one block each, damped by its own mean eigenvalue."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.capture import Component, LayerRecord
from lightning_influence.capture.contexts import full_precision
from lightning_influence.curvature.base import Curvature, Fisher, NonFiniteSums, check_fisher
from lightning_influence.curvature.blocks import Block, load_block
from lightning_influence.curvature.common import Common
from lightning_influence.curvature.damping import check_damping, check_invertible, damping_of
from lightning_influence.curvature.ranks import warn_of_ranks
from lightning_influence.errors import StoreError


class BlockwiseCurvature(Curvature):
    """A block-diagonal Fisher; members differ in their blocks and in the number of passes over the data.

    Arguments are the first four of `EKFAC`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        damping: float | None = None,
        damping_share: float = 0.1,
        fisher: Fisher = "sampled",
        seed: int = 0,
    ) -> None:
        check_damping(type(self).__name__, damping, damping_share)
        check_fisher(type(self).__name__, fisher, seed)
        self.damping, self.damping_share, self.fisher, self.seed = damping, damping_share, fisher, seed
        self.blocks: dict[str, Block] = {}
        self._pass = 0
        self._seen: set[str] = set()
        self._common, self._batch = Common(), torch.empty(0)
        self._finite: list[tuple[Tensor, Tensor]] = []

    @abstractmethod
    def block(self, component: Component, record: LayerRecord) -> Block:
        """An empty block for a component, from the first of its records."""

    def start(self, components: Sequence[Component]) -> None:
        """Begin the first pass."""
        super().start(components)
        self.blocks, self._pass, self._seen = {}, 0, set()
        self._common, self._batch = Common(), torch.empty(0)
        self._finite = []

    def update(self, component: Component, record: LayerRecord) -> None:
        """Covariances in the first pass, squares in their eigenbasis in the second."""
        if component.name not in self.blocks:
            self.blocks[component.name] = self.block(component, record)
        if record.ids is not self._batch:  # records of a batch come with the same ids
            self._note_finite()
            self._batch = record.ids
            self._common.next_batch()
        if self._works_on(self.blocks[component.name]):
            self.blocks[component.name].update(record, self._pass == 1, self._common)
        self._seen.add(component.name)

    def decompose(self, rank: int, ranks: int) -> dict[str, Tensor]:
        """This rank's share of the eigendecompositions of `finish_pass`; see `Curvature.decompose`."""
        self._check_pass()
        factors = {f"{n}/{key}": factor for n, block in self.blocks.items() for key, factor in block.factors().items()}
        return self._common.decompose(factors, rank, ranks)

    def finish_pass(self) -> None:
        """Eigendecompositions after the first pass, the exact Lambda after the second.

        Raises:
            ValueError: If a component was not seen in this pass, its sums are not finite, or the damping is too small
                to be told from 0 beside the eigenvalues.
        """
        self._check_pass()
        for block in filter(self._works_on, self.blocks.values()):
            block.finish(self._pass == 1, self._common)
            # In memory as it will be read back from a store, so that solving rounds in the same way.
            block.fitted = {key: value.contiguous() for key, value in block.fitted.items()}
        self._pass, self._seen, self._common, self._finite = self._pass + 1, set(), Common(), []
        if self._pass == self.num_passes:
            self._check_damped()
            self.fitted = True

    def _works_on(self, block: Block) -> bool:
        """Whether a block learns in this pass; those with a single step do in the last, which sees all of the data."""
        return block.both or self._pass + 1 >= self.num_passes

    def _check_pass(self) -> None:
        unseen = [c.name for c in self.components if c.name not in self._seen]
        if unseen or not self._seen:
            raise ValueError(
                f"`{type(self).__name__}.finish_pass()`: pass {self._pass + 1} saw no gradient of {unseen[:8]}; "
                "expected at least one example in every pass."
            )
        if not all(count for block in self.blocks.values() for _, count in block.factors().values()):
            raise ValueError(
                f"`{type(self).__name__}.finish_pass()`: no position was drawn for a covariance. Expected a larger "
                "covariance_share, or more examples."
            )
        wild = [
            name
            for name, block in self.blocks.items()
            if not all(bool(s.isfinite().all()) for s in block.sums.values())
        ]
        if wild:
            self._note_finite()
            first = next((ids.tolist() for ids, finite in self._finite if not finite), None)
            where = "" if first is None else f" from the batch with ids {first[:64]} on"
            raise NonFiniteSums(
                f"`{type(self).__name__}.finish_pass()`: the sums of {wild[:8]} are not finite{where}, though every "
                "loss was: the inputs or gradients of some example are no numbers, or too large to be squared. "
                "Expected examples on a common scale; look for extreme values in the data."
            )

    def _note_finite(self) -> None:
        """Whether the covariances are finite after this batch: looked at in the end, if there is something wrong."""
        ends = [total.diagonal()[None].sum() for b in self.blocks.values() for total, _ in b.factors().values()]
        if ends and len(self._batch):
            self._finite.append((self._batch, torch.stack([end.double() for end in ends]).isfinite().all()))

    def _check_damped(self) -> None:
        """Refuse a damping that does nothing, warn where it does everything."""
        short = {}
        for name, block in self.blocks.items():
            damping = damping_of(block.eigenvalues(), self.damping, self.damping_share)
            check_invertible(type(self).__name__, repr(name), block.eigenvalues(), damping)
            # From the mean eigenvalue on, the damping decides in every direction.
            short[name] = block.short if damping < float(block.eigenvalues().double().mean()) else []
        warn_of_ranks(type(self).__name__, short, len(self.blocks))

    def solve(self, component: Component, gradients: Tensor) -> Tensor:
        """``(G_c + damping I)^{-1} V``: [q, *shape] -> [q, *shape], computed in the dtype of the fit."""
        self._check_fitted()
        block = self.blocks[component.name]
        solved = block.solve(gradients, damping_of(block.eigenvalues(), self.damping, self.damping_share))
        return solved.to(gradients.dtype)

    def whitened_size(self, component: Component) -> int:
        """As many as the component has parameters."""
        return component.numel

    @full_precision()
    def whiten(self, component: Component, record: LayerRecord) -> Tensor:
        """``(G_c + damping I)^{-1/2} g`` in the eigenbasis of the block, [n, r_c]."""
        self._check_fitted()
        block = self.blocks[component.name]
        return block.whiten(record, damping_of(block.eigenvalues(), self.damping, self.damping_share))

    def multiply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``G_c V`` of every component."""
        self._check_fitted()
        found = {c.name: self.blocks[c.name].multiply(gradients[c.name]) for c in self.components}
        return {name: rows.to(gradients[name].dtype) for name, rows in found.items()}

    def partial(self) -> dict[str, Tensor]:
        """Sums of the current pass, keyed ``component/sum``."""
        return {f"{name}/{key}": value for name, block in self.blocks.items() for key, value in block.sums.items()}

    def settings(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            "damping": self.damping,
            "damping_share": self.damping_share,
            "fisher": self.fisher,
            "seed": self.seed,
        }

    def state(self) -> dict[str, Tensor]:
        """Bases and eigenvalues, keyed ``component/kind.tensor``."""
        self._check_fitted()
        return {
            f"{name}/{block.kind}.{key}": value
            for name, block in self.blocks.items()
            for key, value in block.fitted.items()
        }

    def load_state(self, components: Sequence[Component], state: Mapping[str, Tensor]) -> None:
        """Restore bases and eigenvalues.

        Raises:
            StoreError: If the state is not that of these components.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, tensor = key.rsplit("/", 1)
            # A copy lies where torch puts tensors: with another alignment, as in a file, products round differently.
            parts.setdefault(name, {})[tensor] = value.clone()
        odd = sorted({c.name for c in components} ^ set(parts))
        if odd:
            raise StoreError(f"{type(self).__name__}.load_state: only one of components and factors has {odd[:8]}.")
        self.blocks = {name: load_block(tensors) for name, tensors in parts.items()}
        super().load_state(components, state)
