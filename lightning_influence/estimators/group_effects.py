"""Influence of groups from gradients alone: first order, interactions, second order and the Newton step ([IA])."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_influence.estimators.eigen_curvature import EigenCurvature
from lightning_influence.estimators.factors import Id, check_finite, check_ids, check_weight, few, rows_of
from lightning_influence.estimators.interactions import FORMULA, Change, Interactions, check_change
from lightning_influence.estimators.newton_step import (
    IndefiniteError,
    curvature_term,
    curvature_vectors,
    newton_shift,
)
from lightning_influence.estimators.pair_factors import pair_factors
from lightning_influence.estimators.target_curvature import TargetCurvature, TargetMatrix

Method = Literal["F", "F+I", "F+B", "F+I+B", "N", "N+I"]

# What is summed up: first order, ½ U^T H_f U, Basu's second order, the Newton step, ½ Δ^T H_f Δ.
TERMS: dict[Method, tuple[str, ...]] = {
    "F": ("first",),
    "F+I": ("first", "interaction"),
    "F+B": ("first", "second"),
    "F+I+B": ("first", "interaction", "second"),
    "N": ("newton",),
    "N+I": ("newton", "newton interaction"),
}
METHODS: tuple[Method, ...] = tuple(TERMS)
PairMethod = Literal["F+I", "F+B", "F+I+B"]  # quadratic in the group, so that they are sums over its pairs
PAIR_FORMULAS: dict[PairMethod, str] = {
    "F+I": FORMULA,
    "F+B": "removal ∇fᵀU_S + w ∇fᵀH⁻¹H_S U_S, addition −∇fᵀU_S + w ∇fᵀH⁻¹H_S U_S (Basu et al. 2020)",
    "F+I+B": "F+I, and w ∇fᵀH⁻¹H_S U_S (Basu et al. 2020)",
}

_CALL = "GroupEffects"


@dataclass(frozen=True, eq=False)
class GroupEffects:
    """Predicted change of a target f when a group S of n examples is removed from, or added to, the training set.

    Everything is an inner product of vectors in some coordinates of dimension r: all parameters, a projection, or
    features whitened by H^(-1/2), in which H is the identity. With w the weight of an example in the training objective
    (1/n), U_S = w Σ_{i∈S} H⁻¹ g_i and H_S = Σ_{i∈S} Σ_s ĝ_is ĝ_is^T ([IA] section 3.1; Basu et al. 2020):

    ========  ============================================================================================
    F         ±∇f^T U_S, + for removal
    F+I       F + ½ U_S^T H_f U_S
    F+B       F + w ∇f^T H⁻¹ H_S U_S, the second order of the minimiser, for removal and addition alike
    F+I+B     all three terms
    N         ±∇f^T Δ_S with Δ_S = w (H ∓ w H_S)⁻¹ Σ_{i∈S} g_i, one Newton step on the changed objective
    N+I       N + ½ Δ_S^T H_f Δ_S
    ========  ============================================================================================

    Negative: f, a loss, falls. N is exact where all losses are quadratic, and N+I where the target is, too.

    Attributes:
        shifts: H⁻¹ g_i [n, r], without the weight; any float dtype, sums and products are taken in float64.
        target_gradient: ∇f [r].
        target_curvature: H_f.
        curvature_rows: ĝ_is [n, s, r] with Σ_s ĝ_is ĝ_is^T the Gauss-Newton matrix of example i, or an estimate of
            it; None: no H_S, so that B and N are refused.
        curvature_shifts: H⁻¹ ĝ_is [n, s, r].
        own: H_S as the diagonal of it in the eigenbasis of H, instead of curvature_rows.
        ids: Ids of the examples, all int or all str.
        weight: w.
        damping: Damping of H, for labels.
        reduction: How an example's loss is reduced over its tokens, for labels.

    Raises:
        ValueError: If shapes do not fit, ids repeat, a number is NaN or infinite (ids are named), or the weight is not
            positive.
    """

    shifts: Tensor
    target_gradient: Tensor
    target_curvature: TargetCurvature
    curvature_rows: Tensor | None = None
    curvature_shifts: Tensor | None = None
    own: EigenCurvature | None = None
    _: KW_ONLY
    ids: Sequence[Id]
    weight: float
    damping: str | float | None = None
    reduction: str = "sum"

    def __post_init__(self) -> None:
        self._check_shapes()
        ids = check_ids(_CALL, self.ids, len(self.shifts))
        check_weight(_CALL, self.weight)
        for field, value in (("ids", ids), ("target_gradient", self.target_gradient.detach().double())):
            object.__setattr__(self, field, value)
        for field in ("shifts", "curvature_rows", "curvature_shifts"):
            part = getattr(self, field)
            if part is not None:
                check_finite(_CALL, field, part.flatten(1).isfinite().all(1), ids)
        if not self.target_gradient.isfinite().all():
            raise ValueError(f"`{_CALL}(target_gradient)`: expected finite numbers. Look at the target's losses.")

    @classmethod
    def from_gradients(
        cls,
        gradients: Tensor,
        target_gradient: Tensor,
        target_curvature: TargetCurvature | Tensor,
        hessian: Tensor | None = None,
        curvature_rows: Tensor | None = None,
        *,
        ids: Sequence[Id] | None = None,
        weight: float | None = None,
    ) -> GroupEffects:
        """From matrices, with H dense.

        Args:
            gradients: g_i [n, r].
            target_gradient: ∇f [r].
            target_curvature: H_f, a `TargetCurvature` or a symmetric matrix [r, r].
            hessian: H [r, r], symmetric and positive definite, damping and weight decay included; None for the
                identity: everything is whitened already.
            curvature_rows: [n, s, r], or [n, r] with one row for each example.
            ids: Ids of the examples; row numbers when None.
            weight: Weight of an example in the training objective; 1/n when None.

        Raises:
            ValueError: As `GroupEffects`, or if the Hessian is not positive definite.
        """
        rows = curvature_rows if curvature_rows is None or curvature_rows.dim() == 3 else curvature_rows[:, None]
        shifts, row_shifts = gradients, rows
        if hessian is not None:
            factor, failed = torch.linalg.cholesky_ex(hessian.double())
            if failed:
                raise ValueError(
                    f"`{_CALL}.from_gradients(hessian)`: expected a positive definite matrix [r, r]. Add damping to it."
                )
            shifts = torch.cholesky_solve(gradients.double().mT, factor).mT
            if rows is not None:
                row_shifts = torch.cholesky_solve(rows.double().flatten(0, 1).mT, factor).mT.reshape(rows.shape)
        target = TargetMatrix(target_curvature) if isinstance(target_curvature, Tensor) else target_curvature
        names = range(len(gradients)) if ids is None else ids
        weight = 1 / max(1, len(gradients)) if weight is None else weight
        return cls(shifts, target_gradient, target, rows, row_shifts, ids=names, weight=weight)

    def __len__(self) -> int:
        return len(self.shifts)

    @property
    def curved(self) -> bool:
        """Whether there is an H_S, so that B and N are defined."""
        return self.curvature_rows is not None or self.own is not None

    def estimate(self, group: Iterable[Id], method: Method = "N+I", change: Change = "removal") -> float:
        """`estimates` of one group."""
        return float(self.estimates([group], method, change)[0])

    def estimates(self, groups: Iterable[Iterable[Id]], method: Method = "N+I", change: Change = "removal") -> Tensor:
        """Predicted change of f for each group, float64 [number of groups].

        Raises:
            ValueError: If the method or change is unknown, an id is not among the examples or stands in a group twice,
                or removing a group would leave no positive definite curvature (the group and a sufficient damping are
                told).
        """
        return self.table(groups, [method], change)[method]

    def table(
        self, groups: Iterable[Iterable[Id]], methods: Sequence[Method] = METHODS, change: Change = "removal"
    ) -> dict[Method, Tensor]:
        """`estimates` by several methods, which share what they have in common."""
        check_methods(f"{_CALL}.estimates", methods, change, self.curved)
        rows = [rows_of(_CALL, group, self._rows) for group in groups]
        terms = {term for method in methods for term in TERMS[method]}
        parts = self._terms(rows, terms, 1.0 if change == "removal" else -1.0)
        return {m: torch.stack([parts[term] for term in TERMS[m]]).sum(0) for m in methods}

    def shift(self, group: Iterable[Id], method: Literal["F", "N"] = "N", change: Change = "removal") -> Tensor:
        """Predicted change of the parameters, float64 [r]: ±U_S for "F", ±Δ_S for "N"."""
        check_methods(f"{_CALL}.shift", [method], change, self.curved)
        sign = 1.0 if change == "removal" else -1.0
        rows = rows_of(_CALL, group, self._rows)
        return sign * (self._first(rows) if method == "F" else self._newton(rows, sign))

    def subset(self, ids: Sequence[Id]) -> GroupEffects:
        """The same of some examples, in their order, at the same weight.

        Raises:
            ValueError: If an id is unknown or repeated.
        """
        rows = rows_of(_CALL, ids, self._rows)
        if rows == list(range(len(self))):
            return self
        return replace(
            self,
            shifts=self.shifts[rows],
            curvature_rows=self.curvature_rows[rows] if self.curvature_rows is not None else None,
            curvature_shifts=self.curvature_shifts[rows] if self.curvature_shifts is not None else None,
            own=self.own.subset(rows) if self.own is not None else None,
            ids=ids,
        )

    def interactions(self, method: PairMethod = "F+I") -> Interactions:
        """First order and pair terms of these examples, for pairs, views and selection rules.

        What an addition is estimated to do is −Σ b_i + ½ Σ_ij K_ij for each of the three methods:

        - "F+I": K_ij = u_i^T H_f u_j ([IA] section 3.1).
        - "F+B": K_ij = v_i^T u_j + v_j^T u_i with v_i = w Σ_s (∇f^T H⁻¹ ĝ_is) ĝ_is, from H_S = Σ_i H_i (Basu et al.
          2020). With ĝ = g, the empirical Fisher of the group, and whitened gradients φ = H^(-1/2) g it is
          w (b_i + b_j) φ_i^T φ_j. K is indefinite: alike rows that do harm are estimated to do good once they are many.
        - "F+I+B": their sum.

        K = F M F^T is held in the smallest of several forms: F has scores when H_f is a Fisher of few target examples;
        else it is u with M = H_f, (v, u) with M swapping the two, or, where that is more than n columns, the identity
        with M = K.

        Raises:
            ValueError: If the method is none of these, or needs the curvature of single examples where there is none.
        """
        if method not in get_args(PairMethod):
            raise ValueError(
                f"`{_CALL}.interactions(method={method!r})`: expected 'F+I', 'F+B' or 'F+I+B'; a Newton step is no sum "
                "over pairs."
            )
        check_methods(f"{_CALL}.interactions", [method], "addition", self.curved)
        u = self.weight * self.shifts.double()
        target = self.target_curvature if "interaction" in TERMS[method] else None
        features, metric = pair_factors(u, target, self._vectors() if "second" in TERMS[method] else None)
        return Interactions(
            u @ self.target_gradient,
            features,
            metric,
            ids=self.ids,
            weight=self.weight,
            target_curvature="none" if target is None else target.label,
            damping=self.damping,
            reduction=self.reduction,
            formula=PAIR_FORMULAS[method],
        )

    def _vectors(self) -> Tensor:
        """v with B(S) = Σ_{i∈S} v_i^T U_S, float64 [n, r]."""
        if self.own is not None:
            return self.own.curvature_vectors(self.target_gradient, self.weight)
        assert self.curvature_rows is not None
        assert self.curvature_shifts is not None
        return curvature_vectors(self.target_gradient, self.curvature_rows, self.curvature_shifts, self.weight)

    @cached_property
    def _rows(self) -> dict[Id, int]:
        return {name: row for row, name in enumerate(self.ids)}

    def _terms(self, groups: list[list[int]], terms: set[str], sign: float) -> dict[str, Tensor]:
        """Each term of every group, [number of groups], with its sign."""
        found, gradient, target = {}, self.target_gradient, self.target_curvature
        first = self._stacked([self._first(rows) for rows in groups])
        if "first" in terms:
            found["first"] = sign * first @ gradient
        if "interaction" in terms:
            found["interaction"] = 0.5 * target.squares(first)
        if "second" in terms:
            found["second"] = self._stacked([self._second(*pair) for pair in zip(groups, first, strict=True)])
        if terms & {"newton", "newton interaction"}:
            newton = self._stacked([self._newton(rows, sign) for rows in groups])
            found["newton"] = sign * newton @ gradient
            if "newton interaction" in terms:
                found["newton interaction"] = 0.5 * target.squares(newton)
        return found

    def _stacked(self, parts: list[Tensor]) -> Tensor:
        like = self.target_gradient
        return torch.stack(parts) if parts else like.new_zeros(0, len(like))

    def _first(self, rows: list[int]) -> Tensor:
        """U_S, [r]."""
        return self.weight * self.shifts[rows].sum(0, dtype=torch.float64)

    def _second(self, rows: list[int], first: Tensor) -> Tensor:
        if self.own is not None:
            return self.own.curvature_term(self.target_gradient, first, rows, self.weight)
        return curvature_term(self.target_gradient, first, *self._curvature(rows), self.weight)

    def _newton(self, rows: list[int], sign: float) -> Tensor:
        """Δ_S, [r]."""
        try:
            if self.own is not None:
                return self.own.newton_shift(self._first(rows), rows, self.weight, sign)
            return newton_shift(self._first(rows), *self._curvature(rows), self.weight, sign)
        except IndefiniteError as error:
            names = few([self.ids[row] for row in rows])
            raise ValueError(
                f"`{_CALL}`: removing the group of {names} ({len(rows)} in all) takes away more curvature than there "
                f"is: {error}. Add more than {error.damping:.3g} to the damping ({self.damping}), which is "
                "sufficient, or remove fewer examples; the methods 'F+I' and 'F+I+B' do not need it. In "
                "GroupInfluence, take H_S as EK-FAC has it, group_curvature='eigenvalues', or both matrices exactly: "
                "CG(preconditioner=EKFAC()) and group_curvature='gauss-newton'."
            ) from error

    def _curvature(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Ĝ and ``Ĝ H⁻¹`` of a group, float64 [k, r]."""
        assert self.curvature_rows is not None
        assert self.curvature_shifts is not None
        return self.curvature_rows[rows].double().flatten(0, 1), self.curvature_shifts[rows].double().flatten(0, 1)

    def _check_shapes(self) -> None:
        shape = tuple(self.shifts.shape)
        if len(shape) != 2 or 0 in shape or self.shifts.is_complex():
            raise ValueError(
                f"`{_CALL}(shifts)`: expected a real tensor [n, r], n and r >= 1. Got shape {list(shape)}."
            )
        if tuple(self.target_gradient.shape) != shape[1:]:
            given = list(self.target_gradient.shape)
            raise ValueError(f"`{_CALL}(target_gradient)`: expected [r] with r = {shape[1]}. Got shape {given}.")
        rows, row_shifts = self.curvature_rows, self.curvature_shifts
        if (rows is None) != (row_shifts is None):
            raise ValueError(f"`{_CALL}`: expected both curvature_rows and curvature_shifts, or neither.")
        if rows is None or row_shifts is None:
            return
        if rows.dim() != 3 or (rows.shape[0], rows.shape[2]) != shape or rows.shape != row_shifts.shape:
            raise ValueError(
                f"`{_CALL}(curvature_rows, curvature_shifts)`: expected two tensors [n, s, r] with n, r = {shape}. Got "
                f"shapes {list(rows.shape)} and {list(row_shifts.shape)}."
            )


def check_methods(call: str, methods: Sequence[str], change: str, curved: bool) -> None:
    """Refuse unknown methods and changes, and those that need the curvature of single examples where there is none.

    Raises:
        ValueError: If there is something to refuse.
    """
    check_change(call, change)
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"`{call}(method={method!r})`: expected one of {', '.join(map(repr, METHODS))}.")
        if not curved and set(TERMS[method]) & {"second", "newton"}:
            raise ValueError(
                f"`{call}(method={method!r})`: needs the curvature of single examples. Expected curvature_rows and "
                "curvature_shifts, or the method 'F' or 'F+I'."
            )
