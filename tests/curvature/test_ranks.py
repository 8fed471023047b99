"""A warning where the data could not fill a factor, and only there."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_influence.curvature import EKFAC, KFAC
from lightning_influence.curvature.ranks import FactorRank, numerical_rank, warn_of_ranks
from tests.curvature.models import mlp, normal, points


@pytest.mark.parametrize("kind", [EKFAC, KFAC])
def test_ranks_and_widths_are_told(kind: type[EKFAC]) -> None:
    """Two examples: rank 2 of the 4 (3 and a bias) inputs of the first layer and of its 4 gradients, ..."""
    message = (
        rf"{kind.__name__}: too few positions for factors of full rank in 2 of 2 components \(0: A of rank 2 of 4, "
        r"S of rank 2 of 4; 2: A of rank 2 of 4, S of rank 2 of 3\)"
    )
    with pytest.warns(UserWarning, match=message):
        kind(fisher="empirical").fit(mlp(), points(2))


def test_enough_positions_are_no_reason_to_warn() -> None:
    """Not even where the factor is singular: gradients of logits add up to 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EKFAC().fit(mlp(), points(4))


def test_nothing_depends_on_the_factor_under_a_large_damping() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EKFAC(damping_share=1.0).fit(mlp(), points(2))


@pytest.mark.parametrize("rank", range(1, 6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_is_that_of_the_rows(rank: int, dtype: torch.dtype) -> None:
    rows = (normal(20, rank) @ normal(rank, 5, seed=1)).to(dtype)
    spectrum = torch.linalg.eigvalsh((rows.mT @ rows).double())
    assert numerical_rank(spectrum, dtype) == rank == torch.linalg.matrix_rank(rows)


def test_the_list_is_cut() -> None:
    short = {str(k): [FactorRank("A", 1, 2)] for k in range(6)}
    with pytest.warns(UserWarning, match=r"in 6 of 9 components .*3: A of rank 1 of 2; and 2 more\)"):
        warn_of_ranks("KFAC", short, 9)
