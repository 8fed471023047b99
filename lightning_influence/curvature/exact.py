"""The dense Fisher of a small model, for tests, teaching and logistic regression."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.capture import Component, LayerRecord
from lightning_influence.curvature.base import Curvature, Fisher, NonFiniteSums, check_fisher, symmetric
from lightning_influence.curvature.damping import check_damping, check_invertible, damping_of
from lightning_influence.errors import StoreError

LIMIT = 20_000  # parameters: a float64 matrix of 3.2 GB


class Exact(Curvature):
    """E[g g^T] over all components together, damped and inverted through its eigendecomposition in float64.

    Args:
        damping: Absolute damping; None takes a share of the mean eigenvalue of the whole matrix.
        damping_share: That share.
        fisher: ``"sampled"`` labels from the model, or ``"empirical"``.
        seed: Of the sampled labels.

    Raises:
        ValueError: If an argument is out of range, or the model has too many parameters for a dense matrix.
    """

    num_passes = 1

    def __init__(
        self,
        damping: float | None = None,
        damping_share: float = 0.1,
        fisher: Fisher = "sampled",
        seed: int = 0,
    ) -> None:
        check_damping("Exact", damping, damping_share)
        check_fisher("Exact", fisher, seed)
        self.damping, self.damping_share, self.fisher, self.seed = damping, damping_share, fisher, seed
        self._sums: dict[str, Tensor] = {}
        self._rows: list[Tensor] = []
        self.eigenvalues = torch.empty(0)
        self.basis = torch.empty(0)

    def start(self, components: Sequence[Component]) -> None:
        """Begin the pass."""
        super().start(components)
        size = sum(c.numel for c in components)
        if size > LIMIT:
            raise ValueError(
                f"`Exact()`: {size:,} parameters need a matrix of {8 * size**2 / 1e9:.0f} GB; expected at most "
                f"{LIMIT:,}. Use EKFAC(), or fewer components."
            )
        self._sums = {"moments": torch.zeros(size, size, dtype=torch.float64), "examples": torch.tensor(0)}
        self._rows = []

    def update(self, component: Component, record: LayerRecord) -> None:
        """Gradients of a batch are put side by side until its last component has come."""
        self._rows.append(record.example_gradients().flatten(1).double())
        if component.name == self.components[-1].name:
            rows = torch.cat(self._rows, dim=1)
            self._sums["moments"] = self._sums["moments"].to(rows.device).addmm_(rows.mT, rows)
            self._sums["examples"] += len(record)
            self._rows = []

    def finish_pass(self) -> None:
        """Decompose.

        Raises:
            ValueError: If no example was seen, the sums are not finite, or the damping is lost in rounding beside the
                eigenvalues.
        """
        examples = float(self._sums["examples"]) if self._sums else 0.0
        if not examples:
            raise ValueError("`Exact.finish_pass()`: no gradient was seen; expected at least one example.")
        if not bool(self._sums["moments"].isfinite().all()):
            raise NonFiniteSums("`Exact.finish_pass()`: the sums are not finite: the gradient of some example is not.")
        spectrum, basis = torch.linalg.eigh(symmetric(self._sums["moments"]) / examples)
        # Contiguous as it will be read back from a store, so that solving rounds in the same way.
        self.eigenvalues, self.basis = spectrum.clamp_min(0), basis.contiguous()
        check_invertible("Exact", "all components together", self.eigenvalues, self._damping())
        self._sums, self.fitted = {}, True

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``(G + damping I)^{-1}`` of the whole gradient, components together."""
        self._check_fitted()
        rows = self._flat(gradients).double() @ self.basis / (self.eigenvalues + self._damping())
        return self._by_component(rows @ self.basis.mT, gradients)

    def multiply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``G V`` of the whole gradient, components together."""
        self._check_fitted()
        rows = self._flat(gradients).double() @ self.basis * self.eigenvalues
        return self._by_component(rows @ self.basis.mT, gradients)

    def solve(self, component: Component, gradients: Tensor) -> Tensor:
        """The same for the component's own diagonal block, as if the others were fixed."""
        self._check_fitted()
        block = self._block(component)
        block.diagonal().add_(self._damping())
        solved: Tensor = torch.linalg.solve(block, gradients.flatten(1).mT.double()).mT
        return solved.to(gradients.dtype).reshape(gradients.shape)

    def whitened_size(self, component: Component) -> int:
        """As many as the component has parameters."""
        return component.numel

    def whiten(self, component: Component, record: LayerRecord) -> Tensor:
        """``(G_c + damping I)^{-1/2} g`` for the component's own diagonal block, [n, P_c]."""
        self._check_fitted()
        spectrum, basis = torch.linalg.eigh(symmetric(self._block(component)))
        gradients = record.example_gradients().flatten(1)
        rotated: Tensor = gradients.double() @ basis / (spectrum.clamp_min(0) + self._damping()).sqrt()
        return rotated.to(gradients.dtype)

    def whitened(self, records: Iterable[tuple[Component, LayerRecord]]) -> Tensor:
        """``(G + damping I)^{-1/2}`` of the whole gradient, [n, P], components together."""
        self._check_fitted()
        rows = {component.name: record.example_gradients().flatten(1) for component, record in records}
        flat = torch.cat([rows[c.name] for c in self.components], dim=1)
        return (flat.double() @ self.basis / (self.eigenvalues + self._damping()).sqrt()).to(flat.dtype)

    def partial(self) -> dict[str, Tensor]:
        """The sum of outer products and the count."""
        return self._sums

    def settings(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            "damping": self.damping,
            "damping_share": self.damping_share,
            "fisher": self.fisher,
            "seed": self.seed,
        }

    def state(self) -> dict[str, Tensor]:
        """Eigenvalues and basis."""
        self._check_fitted()
        return {"eigenvalues": self.eigenvalues, "basis": self.basis}

    def load_state(self, components: Sequence[Component], state: Mapping[str, Tensor]) -> None:
        """Restore them.

        Raises:
            StoreError: If the matrix has another size than the components together.
        """
        size = sum(c.numel for c in components)
        if len(state["eigenvalues"]) != size:
            raise StoreError(f"Exact.load_state: {len(state['eigenvalues'])} eigenvalues for {size} parameters.")
        # Copies lie where torch puts tensors: with another alignment, as in a file, products round differently.
        self.eigenvalues, self.basis = state["eigenvalues"].clone(), state["basis"].clone()
        super().load_state(components, state)

    def _block(self, component: Component) -> Tensor:
        """The component's diagonal block of E[g g^T]."""
        names = [c.name for c in self.components]
        start = sum(c.numel for c in self.components[: names.index(component.name)])
        rows = self.basis[start : start + component.numel]
        block: Tensor = torch.matmul(rows * self.eigenvalues, rows.mT)
        return block

    def _damping(self) -> float:
        return damping_of(self.eigenvalues, self.damping, self.damping_share)
