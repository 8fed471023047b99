"""The Fisher block of one component, in the structure its records allow.

Layers that multiply have a Kronecker-factored block; small parameters without that structure (normalisation,
grouped convolutions, anything through the fallback) get their exact block, larger ones its diagonal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.capture import LayerRecord
from lightning_influence.capture.record import DenseRecord, FactoredRecord
from lightning_influence.curvature.base import symmetric
from lightning_influence.curvature.common import Common, add_gram

DENSE_LIMIT = 1024  # parameters up to which a block without Kronecker structure is kept exactly
ROTATED = 1 << 20  # elements of per-example products that are squared at a time, to stay in cache


class Block(ABC):
    """Second moments of one component's gradients.

    Attributes:
        sums: Running sums by name; parts of the data add theirs up.
        fitted: Tensors that remain after the passes, by name.
    """

    kind: ClassVar[str]

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.fitted: dict[str, Tensor] = {}

    @abstractmethod
    def update(self, record: LayerRecord, second: bool, common: Common | None = None) -> None:
        """Take in a record; ``second`` when the basis is already known."""

    @abstractmethod
    def finish(self, second: bool, common: Common | None = None) -> None:
        """Turn the sums of a pass into what remains."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """Of the block, in its own basis."""

    @abstractmethod
    def solve(self, gradients: Tensor, damping: float) -> Tensor:
        """``(block + damping I)^{-1} V``, [q, *shape] -> [q, *shape]."""

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name].add_(value)
        else:
            self.sums[name] = value

    def _count(self, name: str, count: int) -> None:
        self._add(name, torch.tensor(count, dtype=torch.int64))


class KroneckerBlock(Block):
    """``Q_S (Q_S^T V Q_A / (Lambda + damping)) Q_A^T`` with A = E[a a^T], S = E[s s^T] ([MS] section 3.3).

    After the first pass Lambda is the K-FAC one, the products of the eigenvalues of S and A times the mean
    number of positions of an example (so that its trace is that of E[g g^T] when positions are independent);
    a second pass replaces it by the exact second moments in that basis.
    """

    kind = "kronecker"

    def update(self, record: LayerRecord, second: bool, common: Common | None = None) -> None:
        """Covariances over positions, or squares of the rotated gradients over examples."""
        assert isinstance(record, FactoredRecord)
        common = Common() if common is None else common
        if second:
            self._squares(record, common)
            return
        _, _, i, o = record.sizes
        mask = None if record.mask is None or bool(record.mask.all()) else record.mask
        gradients = record.gradients.reshape(-1, o) if mask is None else record.gradients[mask]
        if "input_covariance" not in self.sums:
            for name, width in (("input_covariance", i), ("gradient_covariance", o)):
                self.sums[name] = gradients.new_zeros(width, width)
        common.add_input_gram(self.sums["input_covariance"], record.inputs, mask)
        add_gram(self.sums["gradient_covariance"], gradients)
        self._count("positions", len(gradients))
        self._count("examples", len(record))

    def finish(self, second: bool, common: Common | None = None) -> None:
        """Eigendecompositions in float64 after the first pass, the mean of the squares after the second."""
        if second:
            self.fitted["eigenvalues"] = self.sums["squares"] / self.sums["examples"]
            self.sums = {}
            return
        positions, examples = float(self.sums["positions"]), float(self.sums["examples"])
        common = Common() if common is None else common
        values = {}
        for name in ("input", "gradient"):
            covariance = self.sums[f"{name}_covariance"]
            spectrum, self.fitted[f"{name}_basis"] = common.eigenvectors(covariance, positions)
            values[name] = spectrum.clamp_min(0)
        scale = positions / examples
        self.fitted["eigenvalues"] = (scale * torch.outer(values["gradient"], values["input"])).to(covariance.dtype)
        self.sums = {}

    def eigenvalues(self) -> Tensor:
        """Lambda, [o, i]."""
        return self.fitted["eigenvalues"]

    def solve(self, gradients: Tensor, damping: float) -> Tensor:
        """[q, o, i] -> [q, o, i]."""
        left, right = self.fitted["gradient_basis"], self.fitted["input_basis"]
        rotated = left.mT @ gradients.to(left.dtype) @ right
        return left @ (rotated / (self.eigenvalues() + damping)) @ right.mT

    def _squares(self, record: FactoredRecord, common: Common) -> None:
        """Sum over examples of (Q_S^T g Q_A)^2; the factors are rotated when that is the smaller job."""
        n, t, i, o = record.sizes
        left, right = self.fitted["gradient_basis"], self.fitted["input_basis"]
        if "squares" not in self.sums:
            self.sums["squares"] = left.new_zeros(o, i)
        self._count("examples", n)
        total = self.sums["squares"]
        if t == 1:
            s, a = record.gradients[:, 0] @ left, common.rotated(record.inputs, right)[:, 0]
            total.addmm_(s.square_().mT, a.square())
            return
        step = max(1, ROTATED // (o * i))
        if t * (o * o + i * i) <= o * i * (o + i):
            s, a = record.gradients @ left, common.rotated(record.inputs, right)
            for k in range(0, n, step):
                _add_squares(total, torch.bmm(s[k : k + step].mT, a[k : k + step]))
        else:
            for k in range(0, n, step):
                part = record.narrow(k, min(k + step, n)).example_gradients()
                _add_squares(total, left.mT @ part @ right)


class DenseBlock(Block):
    """The exact block E[g g^T] of a small component, through its eigendecomposition."""

    kind = "dense"

    def update(self, record: LayerRecord, second: bool, common: Common | None = None) -> None:
        """One outer product per example, in the first pass."""
        if second:
            return
        rows = record.example_gradients().flatten(1)
        self._add("moments", rows.mT @ rows)
        self._count("examples", len(record))

    def finish(self, second: bool, common: Common | None = None) -> None:
        """Decompose."""
        if second:
            return
        moments = self.sums["moments"]
        spectrum, basis = torch.linalg.eigh(symmetric(moments) / float(self.sums["examples"]))
        self.fitted = {"eigenvalues": spectrum.clamp_min(0).to(moments.dtype), "basis": basis.to(moments.dtype)}
        self.sums = {}

    def eigenvalues(self) -> Tensor:
        """[P]."""
        return self.fitted["eigenvalues"]

    def solve(self, gradients: Tensor, damping: float) -> Tensor:
        """[q, *shape] -> [q, *shape]."""
        basis = self.fitted["basis"]
        rotated = gradients.flatten(1).to(basis.dtype) @ basis
        return ((rotated / (self.eigenvalues() + damping)) @ basis.mT).reshape(gradients.shape)


class DiagonalBlock(Block):
    """The diagonal of E[g g^T], for large parameters without Kronecker structure (embeddings, tied weights)."""

    kind = "diagonal"

    def update(self, record: LayerRecord, second: bool, common: Common | None = None) -> None:
        """Sum of squares over examples, in the first pass."""
        if second:
            return
        for part in record.chunks():
            self._add("squares", part.example_gradients().square().sum(0))
        self._count("examples", len(record))

    def finish(self, second: bool, common: Common | None = None) -> None:
        """Mean of the squares."""
        if second:
            return
        self.fitted = {"eigenvalues": self.sums["squares"] / self.sums["examples"]}
        self.sums = {}

    def eigenvalues(self) -> Tensor:
        """[*shape]."""
        return self.fitted["eigenvalues"]

    def solve(self, gradients: Tensor, damping: float) -> Tensor:
        """[q, *shape] -> [q, *shape]."""
        return gradients / (self.eigenvalues() + damping)


BLOCKS: dict[str, type[Block]] = {block.kind: block for block in (KroneckerBlock, DenseBlock, DiagonalBlock)}


def block_for(record: LayerRecord) -> Block:
    """The most exact block that the structure and size of a component's records allow."""
    if isinstance(record, FactoredRecord):
        return KroneckerBlock()
    if isinstance(record, DenseRecord) and record.example_numel <= DENSE_LIMIT:
        return DenseBlock()
    return DiagonalBlock()


def load_block(state: Mapping[str, Tensor]) -> Block:
    """A fitted block from its tensors, keyed ``kind.tensor``."""
    [kind] = {key.split(".")[0] for key in state}
    block = BLOCKS[kind]()
    block.fitted = {key.split(".")[1]: value for key, value in state.items()}
    return block


def _add_squares(total: Tensor, gradients: Tensor) -> None:
    if len(gradients) == 1:
        total.addcmul_(gradients[0], gradients[0])
    else:
        total.add_(gradients.square_().sum(0))
