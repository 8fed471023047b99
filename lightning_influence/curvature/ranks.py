"""Whether the data could fill the factors of a curvature."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FactorRank:
    """A factor that was summed over fewer positions than it has rows.

    Attributes:
        name: ``"A"``, of a layer's inputs, or ``"S"``, of the gradients at its outputs.
        rank: Of the factor, numerically.
        width: Rows of the factor.
    """

    name: str
    rank: int
    width: int

    def __str__(self) -> str:
        """For a warning."""
        return f"{self.name} of rank {self.rank} of {self.width}"


def numerical_rank(spectrum: Tensor, dtype: torch.dtype) -> int:
    """Eigenvalues that are no rounding of 0: above ``width * eps * largest``, eps that of the sums.

    >>> numerical_rank(torch.tensor([-1e-9, 1e-9, 1.0, 2.0]), torch.float32)
    2
    """
    return int((spectrum > len(spectrum) * torch.finfo(dtype).eps * spectrum.max()).sum())


def warn_of_ranks(owner: str, short: Mapping[str, Sequence[FactorRank]], count: int) -> None:
    """Warn, once for all of ``count`` components, of those with factors that the data could not fill."""
    found = {name: ", ".join(map(str, ranks)) for name, ranks in short.items() if ranks}
    if not found:
        return
    some = "; ".join(f"{name}: {ranks}" for name, ranks in list(found.items())[:4])
    rest = f"; and {len(found) - 4} more" if len(found) > 4 else ""
    warnings.warn(
        f"{owner}: too few positions for factors of full rank in {len(found)} of {count} components ({some}{rest}). In "
        "the directions that are missing, gradients are divided by the damping alone. Fit on more examples or fewer "
        "components, or raise the damping.",
        stacklevel=4,
    )
