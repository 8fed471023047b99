"""How much is added to a curvature before it is inverted."""

from __future__ import annotations

import math

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


def check_invertible(owner: str, name: str, eigenvalues: Tensor, damping: float) -> None:
    """Refuse to divide by 0: a singular factor needs a damping that its dtype can hold.

    Raises:
        ValueError: If an eigenvalue is 0 with the damping added.
    """
    if not bool((eigenvalues + damping > 0).all()):
        raise ValueError(
            f"`{owner}(damping={damping!r})`: the curvature of {name!r} is singular, and in {eigenvalues.dtype} this "
            "damping is 0. Expected a damping that is not lost in rounding, such as None for 0.1 x the mean eigenvalue."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
