"""How much is added to a curvature before it is inverted."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_damping(owner: str, damping: float | None, share: float) -> None:
    """Refuse a damping that cannot regularise.

    Raises:
        ValueError: Unless ``damping`` is None or a finite number > 0, and ``share`` a finite number > 0.
    """
    if damping is not None and not (_is_number(damping) and damping > 0):
        raise ValueError(f"`{owner}(damping={damping!r})`: expected a number > 0, or None for a share of the mean.")
    if not (_is_number(share) and share > 0):
        raise ValueError(f"`{owner}(damping_share={share!r})`: expected a finite number > 0, for example 0.1.")


def damping_of(eigenvalues: Tensor, damping: float | None, share: float) -> float:
    """Absolute damping if given, else ``share`` times the component's mean eigenvalue (Grosse et al. 2023: 0.1).

    A component that never received a gradient has no scale to take a share of; 1 leaves its gradients alone.
    """
    if damping is not None:
        return damping
    mean = float(eigenvalues.double().mean())
    return share * mean if mean > 0 else 1.0


def check_invertible(owner: str, what: str, eigenvalues: Tensor, damping: float) -> None:
    """Refuse to divide by rounding: a singular curvature needs a damping that is more than that.

    Singular is what has an eigenvalue below width * eps * largest, eps that of the dtype in which it was summed up.
    Lost is a damping below the same with the eps of float64, in which eigenvalues are found. (In float32 that is also
    where the rounding of gradients, which enters squared, weighs as much as the gradients.)

    Args:
        owner: Class whose damping it is.
        what: Whose eigenvalues these are, for the error.
        eigenvalues: Of any shape, >= 0; the longest dimension counts as the width.
        damping: The absolute one.

    Raises:
        ValueError: If the curvature is singular and the damping lost.
    """
    smallest, largest = (float(end) for end in eigenvalues.aminmax())
    scale = max(eigenvalues.shape) * largest
    level = max(scale * torch.finfo(torch.float64).eps, torch.finfo(eigenvalues.dtype).tiny)
    if damping <= level and smallest <= scale * torch.finfo(eigenvalues.dtype).eps:
        raise ValueError(
            f"`{owner}(damping={damping!r})`: the curvature of {what} is singular (eigenvalues from {smallest:.3g} to "
            f"{largest:.3g}), and this damping is lost in rounding. Expected more than {level:.3g}, or None for 0.1 x "
            "the mean eigenvalue."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
