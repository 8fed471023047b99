"""The set functions and optimizers of the package submodlib-py as a selection rule."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors, Id
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.base import SelectionRule
from lightning_influence.selection.budget import Budget, TokenBudget
from lightning_influence.selection.constraints import Constraints
from lightning_influence.selection.row_data import checked_embeddings, of_rows, rows_by_id, unit_rows

INSTALL = "pip install submodlib-py (wheels for Python 3.8 to 3.12 on Linux x86-64 and macOS)"
BLOCK = 2**22  # similarities that are formed in float64 at once: 32 MiB
EXACT = 2**24  # whole numbers up to here are exact in float32, in which submodlib counts the budget

Name: TypeAlias = Literal["facility-location", "graph-cut", "log-determinant", "disparity-sum", "disparity-min"]
Optimizer: TypeAlias = Literal["NaiveGreedy", "LazyGreedy", "StochasticGreedy"]
WITH_LAMBDA = ("graph-cut", "log-determinant")
RISING = ("disparity-sum", "disparity-min")  # gains may rise as rows are added


@dataclass(frozen=True, eq=False, repr=False)
class Submodlib(SelectionRule):
    """Maximises a set function of submodlib-py (Kaushal et al. 2022) over the pool, by one of its optimizers.

    With c_ij the cosine of rows i and j, s_ij = max(c_ij, 0) and V the pool:

    - "facility-location": Σ_{i∈V} max_{j∈S} s_ij. `FacilityLocation` has the same picks in less memory;
    - "graph-cut": Σ_{i∈V, j∈S} s_ij − λ Σ_{i,j∈S} s_ij;
    - "log-determinant": log det (C_S + λ 1), the most probable set of a determinantal point process;
    - "disparity-sum": Σ_{i<j∈S} (1 − s_ij), and "disparity-min": the smallest 1 − s_ij of two rows of S.

    A function that builds one of submodlib's own objects is taken too, for targets (its mutual information functions),
    other similarities or features. Values only fill in the predicted gains.

    submodlib keeps the similarities of all pairs, in float32: 8 n² bytes for facility location; the others go through
    Python's lists and take about 40 n², 16 GB for 20,000 rows. Equal gains: its "NaiveGreedy" prefers the later
    element, so that rows are handed over by falling id; "LazyGreedy" has no such order, but a permuted pool gives the
    permuted selection either way.

    Of the constraints it takes ``exclude``, ``duplicates`` and ``stop_if_negative_gain``, which is its own and asks for
    the gain of the set function, not for the target loss. A `TokenBudget` becomes its ``costs``; with the same numbers
    as `Constraints.costs`, gains are taken per cost (its ``costSensitiveGreedy``). Excluded rows are represented all
    the same by the first two functions.

    Attributes:
        function: One of the names above, or a function of the embeddings, float64 [n, d], and the list of the ids of
            these rows, that returns an object such as ``submodlib.FeatureBasedFunction`` over n elements in this order.
            submodlib checks little: gains that are NaN can end the process.
        embeddings: [N, d], matched with the rows of the pool by id. None takes the features that `select` is given.
        ids: Ids of the embeddings; None for positions.
        lambda_val: λ of "graph-cut" (>= 0) and "log-determinant" (> 0), submodlib's lambdaVal; both need one.
        optimizer: "NaiveGreedy"; "LazyGreedy", the same picks where returns fall, and much faster for facility
            location; or "StochasticGreedy", which looks at ⌊(n / k) ln(1 / ε)⌋ rows for each pick, always the same.
        epsilon: ε in (0, 1) of "StochasticGreedy".

    Raises:
        ModuleNotFoundError: If submodlib-py is not installed.
        ValueError: If an argument does not fit; from `select`, if a row has no finite embedding (ids are named), there
            are neither embeddings nor features, or submodlib has no way to keep to the budget or constraints.
    """

    weighs_costs: ClassVar[bool] = True

    function: Name | Callable[[np.ndarray[Any, Any], list[Id]], Any] = "facility-location"
    embeddings: Any = None
    ids: Sequence[Id] | None = None
    lambda_val: float | None = field(default=None, kw_only=True)
    optimizer: Optimizer = field(default="NaiveGreedy", kw_only=True)
    epsilon: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.function) and self.function not in get_args(Name):
            raise ValueError(
                f"`Submodlib(function={self.function!r})`: expected one of {list(get_args(Name))}, or a function of "
                "embeddings and ids that builds an object of submodlib."
            )
        self._check_optimizer()
        self._check_lambda()
        object.__setattr__(self, "embeddings", checked_embeddings("Submodlib", self.embeddings, self.ids))
        if importlib.util.find_spec("submodlib") is None:
            raise ModuleNotFoundError(
                f"`Submodlib` needs the package submodlib-py, which is not installed: {INSTALL}. FacilityLocation "
                "needs no package."
            )

    def __repr__(self) -> str:
        named = isinstance(self.function, str)
        function = self.function if named else getattr(self.function, "__name__", type(self.function).__name__)
        weight = "" if self.lambda_val is None else f", lambda_val={self.lambda_val!r}"
        epsilon = f", epsilon={self.epsilon!r}" if self.optimizer == "StochasticGreedy" else ""
        return f"Submodlib({function!r}{weight}, optimizer={self.optimizer!r}{epsilon})"

    def _check_optimizer(self) -> None:
        if self.optimizer not in get_args(Optimizer):
            lazier = "; LazierThanLazyGreedy of submodlib 0.0.3 crashes where gains are 0"
            raise ValueError(
                f"`Submodlib(optimizer={self.optimizer!r})`: expected one of {list(get_args(Optimizer))}{lazier}."
            )
        if self.optimizer == "LazyGreedy" and self.function in RISING:
            raise ValueError(
                f"`Submodlib({self.function!r}, optimizer='LazyGreedy')`: expected a function with falling returns, "
                "which a disparity has not. Take optimizer='NaiveGreedy'."
            )
        if not isinstance(self.epsilon, float) or not 0 < self.epsilon < 1:
            raise ValueError(f"`Submodlib(epsilon={self.epsilon!r})`: expected a number in (0, 1), such as 0.1.")

    def _check_lambda(self) -> None:
        given = self.lambda_val
        if self.function not in WITH_LAMBDA:
            if given is not None:
                raise ValueError(f"`Submodlib(lambda_val={given!r})`: expected function to be one of {WITH_LAMBDA}.")
            return
        low = 0.0 if self.function == "graph-cut" else math.ulp(0.0)
        number = isinstance(given, int | float) and not isinstance(given, bool)
        if not number or not low <= given < math.inf:  # type: ignore[operator]
            bound = ">= 0" if low == 0 else "> 0"
            raise ValueError(f"`Submodlib({self.function!r}, lambda_val={given!r})`: expected a finite number {bound}.")

    @property
    def known_rows(self) -> int:
        """Those of the embeddings, where they have no ids."""
        return len(self.embeddings) if self.ids is None and self.embeddings is not None else 0

    def admission(self, call: str, pool: Factors, budget: Budget, constraints: Constraints) -> Admission:
        """As in `SelectionRule`; also refuses what submodlib's optimizers cannot keep to."""
        refused = [name for name in ("must_include", "min_per_source", "max_per_source") if getattr(constraints, name)]
        if refused:
            raise ValueError(
                f"`{call}(constraints)`: submodlib's optimizers start from no row and know no sources. Expected no "
                f"{' or '.join(refused)}; FacilityLocation and InteractionGreedy keep to every constraint."
            )
        tokens = isinstance(budget, TokenBudget)
        if tokens and self.optimizer != "NaiveGreedy":
            raise ValueError(
                f"`{call}(budget={budget!r})`: expected optimizer='NaiveGreedy' with a budget in tokens. "
                "StochasticGreedy takes no costs, and LazyGreedy reads past its end once no other row fits."
            )
        admission = super().admission(call, pool, budget, constraints)
        if constraints.costs is not None:
            costs = torch.as_tensor(of_rows(call, pool.ids, constraints.costs), dtype=torch.float64)
            same = (costs == admission.sizes.cpu())[admission.open.cpu()]
            if not tokens or not same.all():
                raise ValueError(
                    f"`{call}(constraints)`: submodlib takes gains per cost only where the budget is spent in the same "
                    "costs. Expected TokenBudget(..., counts=costs), or FacilityLocation, which takes any."
                )
        if _room(admission) > EXACT:
            raise ValueError(
                f"`{call}(budget={budget!r})`: submodlib counts in float32, which is exact up to {EXACT:,}. Expected "
                f"no more than that, got {_room(admission):,}; FacilityLocation takes any number."
            )
        return admission

    def _pick(self, pool: Factors, budget: int) -> Sequence[int]:
        return self._picks(pool, Admission.of_rows(pool, budget), Constraints())

    def _pick_within(self, call: str, pool: Factors, budget: Budget, constraints: Constraints) -> Sequence[int]:
        admission = self.admission(call, pool, budget, constraints)
        return self._picks(pool, admission, constraints, in_tokens=isinstance(budget, TokenBudget))

    def _picks(
        self, pool: Factors, admission: Admission, constraints: Constraints, in_tokens: bool = False
    ) -> list[int]:
        order = pool.id_ranks.cpu().argsort(descending=True)
        candidates = admission.open.cpu()[order].nonzero().flatten()  # by their place in this order
        rows = order[candidates].tolist()
        n, room = len(rows), _room(admission)
        options: dict[str, Any] = {"optimizer": self.optimizer, "epsilon": self.epsilon, "show_progress": False}
        options["stopIfNegativeGain"] = constraints.stop_if_negative_gain
        if in_tokens:
            unit = 2.0 ** -math.frexp(room / n)[1]  # submodlib refuses a budget that is not below n
            options["costs"] = [size * unit for size in admission.sizes.cpu()[rows].tolist()]
            options["costSensitiveGreedy"] = constraints.costs is not None
            amount = room * unit
        else:
            amount = min(room, n - 1)
            self._check_sample(n, amount)
        function = self._function(pool, candidates, [pool.ids[row] for row in rows])
        picks = [int(place) for place, _ in function.maximize(amount, **options)] if amount else []
        if len({*picks} & {*range(n)}) < len(picks):
            raise ValueError(
                f"`{self!r}.select`: submodlib picked {picks[:8]} of {n} rows. Expected gains that are numbers."
            )
        if not in_tokens and len(picks) == amount < room:
            (last,) = {*range(n)} - {*picks}
            if not constraints.stop_if_negative_gain or function.marginalGain({*picks}, last) >= 0:
                picks.append(last)
        return [rows[place] for place in picks]

    def _check_sample(self, n: int, picks: int) -> None:
        if self.optimizer == "StochasticGreedy" and picks and n / picks * math.log(1 / self.epsilon) < 1 + 1e-6:
            raise ValueError(
                f"`{self!r}.select`: expected an epsilon below exp(−k / n) = {math.exp(-picks / n):.3g}, so that at "
                f"least one of {n} rows is drawn for each of {picks} picks."
            )

    def _function(self, pool: Factors, candidates: Tensor, ids: list[Id]) -> Any:
        """The object of submodlib over the candidates: places among the rows by falling id, and their ids."""
        call, n = f"{self!r}.select", len(candidates)
        if callable(self.function):
            vectors = rows_by_id(call, pool, self.embeddings, self.ids).flip(0)
            return _checked(call, self.function(vectors[candidates].numpy(), ids), n)
        vectors = unit_rows(call, pool, self.embeddings, self.ids).flip(0)
        own = vectors[candidates]
        module, shared = importlib.import_module("submodlib"), {"n": n, "mode": "dense"}
        if self.function == "facility-location":
            similar = _cosines(vectors, own)
            return module.FacilityLocationFunction(**shared, separate_rep=True, n_rep=len(vectors), sijs=similar)
        if self.function == "graph-cut":
            shared |= {"lambdaVal": self.lambda_val, "ggsijs": _cosines(own, own)}
            if n < len(vectors):
                shared |= {"separate_rep": True, "n_rep": len(vectors), "mgsijs": _cosines(vectors, own)}
            return module.GraphCutFunction(**shared)
        if self.function == "log-determinant":
            if self.lambda_val is None or self.lambda_val * EXACT < n:
                raise ValueError(
                    f"`{call}`: expected lambda_val >= n / 2²⁴ = {n / EXACT:.3g}, so that every determinant stays "
                    "positive when similarities are rounded to float32."
                )
            return module.LogDeterminantFunction(**shared, lambdaVal=self.lambda_val, sijs=_cosines(own, own, -1))
        disparity = module.DisparitySumFunction if self.function == "disparity-sum" else module.DisparityMinFunction
        return disparity(**shared, sijs=_cosines(own, own))


def _room(admission: Admission) -> int:
    """What can be spent: the budget, or all that may be picked where that is less."""
    return min(admission.slack, int(admission.sizes[admission.open].sum()))


def _checked(call: str, built: Any, n: int) -> Any:
    size = len(getattr(built, "effective_ground", ()))
    if not hasattr(built, "maximize") or size != n:
        raise ValueError(
            f"`{call}`: expected function to build an object of submodlib over {n} elements, got "
            f"{type(built).__name__} over {size}."
        )
    return built


def _cosines(left: Tensor, right: Tensor, least: float = 0) -> np.ndarray[Any, Any]:
    """Inner products of rows of length 1, at least ``least``, float32 [left, right]."""
    found = torch.empty(len(left), len(right), dtype=torch.float32)
    step = max(1, BLOCK // len(right))
    for start in range(0, len(left), step):
        found[start : start + step] = (left[start : start + step] @ right.mT).clamp(least, 1)
    return found.numpy()
