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
from lightning_influence.curvature.common import Basis, Common, add_grams, back, rotate
from lightning_influence.curvature.ranks import FactorRank, numerical_rank
from lightning_influence.curvature.subsample import Subsample

DENSE_LIMIT = 1024  # parameters up to which a block without Kronecker structure is kept exactly
ROTATED = 1 << 20  # elements of per-example products that are squared at a time, to stay in cache


class Block(ABC):
    """Second moments of one component's gradients.

    Attributes:
        sums: Running sums by name; parts of the data add theirs up.
        fitted: Tensors that remain after the passes, by name.
        short: Factors that the data could not fill.
        both: Whether there is something to learn in each of two passes, or in the last alone.
    """

    kind: ClassVar[str]
    both: ClassVar[bool] = False

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.fitted: dict[str, Tensor] = {}
        self.short: list[FactorRank] = []

    @abstractmethod
    def update(self, record: LayerRecord, second: bool, common: Common | None = None) -> None:
        """Take in a record; ``second`` when the basis is already known."""

    @abstractmethod
    def finish(self, second: bool, common: Common | None = None) -> None:
        """Turn the sums of a pass into what remains."""

    def factors(self) -> dict[str, tuple[Tensor, float]]:
        """Those of the sums that `finish` decomposes, each with what it is divided by first."""
        return {}

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """Of the block, in its own basis."""

    @abstractmethod
    def scaled(self, gradients: Tensor, factors: Tensor) -> Tensor:
        """``Q diag(factors) Q^T V`` in the block's basis Q, factors like `eigenvalues`: [q, *shape] -> [q, *shape]."""

    def solve(self, gradients: Tensor, damping: float) -> Tensor:
        """``(block + damping I)^{-1} V``, [q, *shape] -> [q, *shape]."""
        return self.scaled(gradients, (self.eigenvalues() + damping).reciprocal())

    def rotated(self, record: LayerRecord) -> Tensor:
        """Gradients as `solve_rotated` takes them: in a basis that is quickly reached from a record, or as they are."""
        return record.example_gradients()

    def solve_rotated(self, gradients: Tensor, damping: float) -> Tensor:
        """`solve` of what `rotated` gave."""
        return self.solve(gradients, damping)

    def multiply(self, gradients: Tensor) -> Tensor:
        """``block V``, without damping: [q, *shape] -> [q, *shape]."""
        return self.scaled(gradients, self.eigenvalues())

    @abstractmethod
    def whiten(self, record: LayerRecord, damping: float) -> Tensor:
        """``(block + damping I)^{-1/2} g`` in the block's own basis, [n, P]."""

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

    Args:
        max_width: Factors that are wider are kept as diagonal blocks of at most this width; None keeps all.
        subsample: What the covariances are taken from; None for everything.
    """

    kind = "kronecker"
    both = True

    def __init__(self, max_width: int | None = None, subsample: Subsample | None = None) -> None:
        super().__init__()
        self.max_width, self.subsample = max_width, subsample
        self.bases: dict[str, Basis] = {}

    def update(self, record: LayerRecord, second: bool, common: Common | None = None) -> None:
        """Covariances over positions, or squares of the rotated gradients over examples."""
        assert isinstance(record, FactoredRecord)
        common = Common() if common is None else common
        if second:
            self._squares(record, common)
            return
        n, t, i, o = record.sizes
        mask = None if record.mask is None or bool(record.mask.all()) else record.mask
        occupied = n * t if mask is None else int(mask.sum())
        if self.subsample is not None:
            mask = self.subsample.positions(record.ids, t, mask)
            mask = mask.to(record.gradients.device)
        gradients = record.gradients.reshape(-1, o) if mask is None else record.gradients[mask]
        for side, width in (("input", i), ("gradient", o)):
            if not self._covariances(side):
                for k, size in enumerate(piece_sizes(width, self.max_width)):
                    self.sums[f"{side}_covariance.{k}"] = gradients.new_zeros(size, size)
        common.add_input_grams(self._covariances("input"), record.inputs, mask)
        add_grams(self._covariances("gradient"), gradients)
        self._count("positions", len(gradients))
        self._count("occupied", occupied)
        self._count("examples", n)

    def finish(self, second: bool, common: Common | None = None) -> None:
        """Eigendecompositions in float64 after the first pass, the mean of the squares after the second."""
        if second:
            self.fitted["eigenvalues"] = self.sums["squares"] / self.sums["examples"]
            self.sums = {}
            return
        common = Common() if common is None else common
        positions, examples = float(self.sums["positions"]), float(self.sums["examples"])
        self.short = []
        values = {}
        for side, name in (("input", "A"), ("gradient", "S")):
            spectra = []
            for k, covariance in enumerate(self._covariances(side)):
                spectrum, self.fitted[f"{side}_basis.{k}"] = common.eigenvectors(covariance, positions)
                spectra.append(spectrum.clamp_min(0))
                if positions < len(spectrum):
                    rank = numerical_rank(spectrum, covariance.dtype)
                    self.short.append(FactorRank(name, rank, len(spectrum)))
            values[side] = torch.cat(spectra)
        scale = float(self.sums["occupied"]) / examples
        self.fitted["eigenvalues"] = (scale * torch.outer(values["gradient"], values["input"])).to(covariance.dtype)
        self.sums, self.bases = {}, {}

    def factors(self) -> dict[str, tuple[Tensor, float]]:
        """Covariances over the positions seen."""
        found = {key: total for key, total in self.sums.items() if "_covariance." in key}
        return {key: (total, float(self.sums["positions"])) for key, total in found.items()}

    def eigenvalues(self) -> Tensor:
        """Lambda, [o, i]."""
        return self.fitted["eigenvalues"]

    def scaled(self, gradients: Tensor, factors: Tensor) -> Tensor:
        """[q, o, i] -> [q, o, i]."""
        return self._back(self._rotate(gradients) * factors)

    def rotated(self, record: LayerRecord) -> Tensor:
        """``Q_S^T g Q_A``, [n, o, i] in the dtype of g; the factors are rotated when that is the smaller job."""
        left, right = self._basis("gradient"), self._basis("input")
        o, i = self.eigenvalues().shape
        if isinstance(record, FactoredRecord) and record.sizes[1] * (o * o + i * i) <= o * i * (o + i):
            dtype = left[0].dtype
            outputs, inputs = rotate(record.gradients.to(dtype), left), rotate(record.inputs.to(dtype), right)
            return torch.bmm(outputs.mT, inputs).to(record.gradients.dtype)
        gradients = record.example_gradients()
        return self._rotate(gradients).to(gradients.dtype)

    def solve_rotated(self, gradients: Tensor, damping: float) -> Tensor:
        """Half of the work of `solve`."""
        return self._back(gradients.to(self.eigenvalues().dtype) / (self.eigenvalues() + damping))

    def _rotate(self, gradients: Tensor) -> Tensor:
        left, right = self._basis("gradient"), self._basis("input")
        return rotate(rotate(gradients.to(left[0].dtype).mT, left).mT, right)

    def _back(self, rotated: Tensor) -> Tensor:
        """Laid out row by row: what multiplies many batches would be copied for each."""
        return back(back(rotated, self._basis("input")).mT, self._basis("gradient")).mT.contiguous()

    def _covariances(self, side: str) -> list[Tensor]:
        return [total for key, total in self.sums.items() if key.startswith(f"{side}_covariance.")]

    def _basis(self, side: str) -> Basis:
        """The same object every time, by which what was rotated is found again."""
        if side not in self.bases:
            names = sorted((key for key in self.fitted if key.startswith(f"{side}_basis")), key=piece_of)
            self.bases[side] = tuple(self.fitted[name] for name in names)
        return self.bases[side]

    def whiten(self, record: LayerRecord, damping: float) -> Tensor:
        """[n, o i]."""
        return (self.rotated(record) / (self.eigenvalues() + damping).sqrt()).flatten(1)

    def _squares(self, record: FactoredRecord, common: Common) -> None:
        """Sum over examples of (Q_S^T g Q_A)^2; the factors are rotated when that is the smaller job."""
        n, t, i, o = record.sizes
        left, right = self._basis("gradient"), self._basis("input")
        if "squares" not in self.sums:
            self.sums["squares"] = left[0].new_zeros(o, i)
        self._count("examples", n)
        total = self.sums["squares"]
        if t == 1:
            s, a = rotate(record.gradients[:, 0], left), common.rotated(record.inputs, right)[:, 0]
            total.addmm_(s.square().mT, a.square())
            return
        step = max(1, ROTATED // (o * i))
        if t * (o * o + i * i) <= o * i * (o + i):
            s, a = common.rotate(record.gradients, left), common.rotated(record.inputs, right)
            for k in range(0, n, step):
                _add_squares(total, torch.bmm(s[k : k + step].mT, a[k : k + step]))
        else:
            for k in range(0, n, step):
                part = record.narrow(k, min(k + step, n)).example_gradients()
                _add_squares(total, rotate(rotate(part, right).mT, left).mT)


class DenseBlock(Block):
    """The exact block E[g g^T] of a small component, through its eigendecomposition."""

    kind = "dense"

    def update(self, record: LayerRecord, second: bool, common: Common | None = None) -> None:
        """One outer product per example."""
        rows = record.example_gradients().flatten(1)
        self._add("moments", rows.mT @ rows)
        self._count("examples", len(record))

    def finish(self, second: bool, common: Common | None = None) -> None:
        """Decompose."""
        common = Common() if common is None else common
        [(moments, count)] = self.factors().values()
        spectrum, basis = common.eigenvectors(moments, count)
        self.fitted = {"eigenvalues": spectrum.clamp_min(0).to(moments.dtype), "basis": basis}
        self.sums = {}

    def factors(self) -> dict[str, tuple[Tensor, float]]:
        """The sum of outer products over the examples seen."""
        return {"moments": (self.sums["moments"], float(self.sums["examples"]))} if self.sums else {}

    def eigenvalues(self) -> Tensor:
        """[P]."""
        return self.fitted["eigenvalues"]

    def scaled(self, gradients: Tensor, factors: Tensor) -> Tensor:
        """[q, *shape] -> [q, *shape]."""
        basis = self.fitted["basis"]
        rotated = gradients.flatten(1).to(basis.dtype) @ basis
        return ((rotated * factors) @ basis.mT).reshape(gradients.shape)

    def whiten(self, record: LayerRecord, damping: float) -> Tensor:
        """[n, P]."""
        basis = self.fitted["basis"]
        rotated = record.example_gradients().flatten(1).to(basis.dtype) @ basis
        return rotated / (self.eigenvalues() + damping).sqrt()


class DiagonalBlock(Block):
    """The diagonal of E[g g^T], for large parameters without Kronecker structure (embeddings, tied weights)."""

    kind = "diagonal"

    def update(self, record: LayerRecord, second: bool, common: Common | None = None) -> None:
        """Sum of squares over examples."""
        for part in record.chunks():
            self._add("squares", part.example_gradients().square().sum(0))
        self._count("examples", len(record))

    def finish(self, second: bool, common: Common | None = None) -> None:
        """Mean of the squares."""
        self.fitted = {"eigenvalues": self.sums["squares"] / self.sums["examples"]}
        self.sums = {}

    def eigenvalues(self) -> Tensor:
        """[*shape]."""
        return self.fitted["eigenvalues"]

    def scaled(self, gradients: Tensor, factors: Tensor) -> Tensor:
        """[q, *shape] -> [q, *shape]."""
        return gradients * factors

    def whiten(self, record: LayerRecord, damping: float) -> Tensor:
        """[n, P]."""
        return (record.example_gradients() / (self.eigenvalues() + damping).sqrt()).flatten(1)


BLOCKS: dict[str, type[Block]] = {block.kind: block for block in (KroneckerBlock, DenseBlock, DiagonalBlock)}


def block_for(record: LayerRecord, max_width: int | None = None, subsample: Subsample | None = None) -> Block:
    """The most exact block that the structure and size of a component's records allow."""
    if isinstance(record, FactoredRecord):
        return KroneckerBlock(max_width, subsample)
    if isinstance(record, DenseRecord) and record.example_numel <= DENSE_LIMIT:
        return DenseBlock()
    return DiagonalBlock()


def load_block(state: Mapping[str, Tensor]) -> Block:
    """A fitted block from its tensors, keyed ``kind.tensor``."""
    [kind] = {key.split(".")[0] for key in state}
    block = BLOCKS[kind]()
    block.fitted = {key.split(".", 1)[1]: value for key, value in state.items()}
    return block


def piece_sizes(width: int, max_width: int | None) -> list[int]:
    """Widths of the fewest, about equally wide diagonal blocks that are no wider than allowed.

    >>> piece_sizes(10, 4)
    [4, 3, 3]
    """
    count = 1 if max_width is None else -(-width // max_width)
    return [width // count + (k < width % count) for k in range(count)]


def piece_of(key: str) -> int:
    """Number of a piece in a key ``name.number``; a basis that was stored without pieces is the first of one."""
    return int(key.rpartition(".")[2]) if "." in key else 0


def _add_squares(total: Tensor, gradients: Tensor) -> None:
    if len(gradients) == 1:
        total.addcmul_(gradients[0], gradients[0])
    else:
        total.add_(gradients.square_().sum(0))
