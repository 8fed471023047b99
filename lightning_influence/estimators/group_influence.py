"""Influence of a group on a target, from a model, a curvature, training data and target examples ([IA])."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_influence.capture import Component, ExampleLoader
from lightning_influence.capture.budget import check_bytes
from lightning_influence.capture.component import Select
from lightning_influence.capture.examples import TRAIN
from lightning_influence.curvature import Curvature, ProjectedGram
from lightning_influence.curvature.base import loss_for
from lightning_influence.curvature.kronecker import KroneckerCurvature
from lightning_influence.curvature.products import PRODUCTS, ProductKind
from lightning_influence.errors import NotFittedError
from lightning_influence.estimators.base import Loss
from lightning_influence.estimators.eigen_curvature import EigenCurvature, WhitenedGradients
from lightning_influence.estimators.factors import Id, check_weight, members, rows_of
from lightning_influence.estimators.gradient_coordinates import Coordinates, coordinates_of
from lightning_influence.estimators.gradient_rows import GradientRows
from lightning_influence.estimators.group_effects import (
    METHODS,
    TERMS,
    GroupEffects,
    Method,
    PairMethod,
    check_methods,
)
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.estimators.interactions import Change, Interactions
from lightning_influence.estimators.queries import check_one_loss
from lightning_influence.estimators.target_curvature import TargetCurvature, TargetProduct, TargetRows
from lightning_influence.store import Store

GroupCurvature: TypeAlias = Literal["sampled", "empirical", "gauss-newton", "eigenvalues"]
TargetKind: TypeAlias = Literal["sampled", "empirical"] | ProductKind

_CALL = "GroupInfluence"


@dataclass(frozen=True, eq=False)
class _Fit:
    """What `fit` leaves behind."""

    coordinates: Coordinates
    target_gradient: Tensor
    target: TargetCurvature
    pool: ExampleLoader
    rows: dict[Id, int]
    weight: float


class GroupInfluence:
    """Predicted change of the mean target loss when groups of examples are removed from, or added to, the training.

    All methods of `GroupEffects`, F, F+I, F+B, F+I+B, N and N+I, for any curvature of the package::

        influence = GroupInfluence(model, EKFAC()).fit(train, targets)
        influence.estimates([range(30), [5, 9]], method="N+I", change="removal")

    Gradients of the groups' members only are kept, as rows of all parameters: groups are worked on a few at a time
    within ``memory_budget``. With a `ProjectedGram` they are rows of LoGra's projected space, formed from the factors
    of the gradients, and pools of any size fit.

    Removal by N takes H_S away from H, so the two should be of one kind: `CG` with ``"gauss-newton"`` (all exact, for
    small models), `Exact` with ``"sampled"``, whose H is the sum of the very same outer products, or `EKFAC` with
    ``"eigenvalues"``. Otherwise EK-FAC and LoGra are no sums over examples: large groups of alike rows can be refused,
    and the damping that they need is told. Where there are few hundred examples, labels drawn once make H noisy, for
    every method.

    Args:
        model: The model at the parameters of interest. Left as it was.
        curvature: H; None for ``EKFAC()``. Fitted by `fit` on the training data unless it is already. Its damping
            stands for the weight decay of the training too.
        target_curvature: H_f, the curvature of the mean target loss: ``"empirical"`` or ``"sampled"`` for the Fisher of
            the target examples, under their own labels or labels drawn from the model; ``"gauss-newton"`` or
            ``"hessian"`` for exact products with vectors, one pass over the targets for every call; or a `Curvature`
            such as ``EKFAC()``, fitted on the targets (by `fit` unless it is already) and applied without damping.
        loss: Per-example loss; None resolves it.
        components: What `find_components` takes; None takes those of a fitted curvature, else everything trainable.
        group_curvature: H_S, needed by B and N: ``"sampled"``, the gradients of the members under labels drawn from the
            model, at the curvature's own seed, so that H and H_S fit together; ``"empirical"``, under their own labels;
            ``"gauss-newton"``, exact, by as many passes as the model has outputs (classification and regression with
            few of them); ``"eigenvalues"``, for `EKFAC` and `KFAC`, what the members, under the labels of the fit, add
            to the eigenvalues of H, in its eigenbasis (`EigenCurvature`).
        draws: Labels drawn for each example where they are sampled, of members and of targets; more are more precise.
        seed: Of the labels drawn for the targets.
        batch_size: Examples per batch; None takes the loader's, or 32.
        memory_budget: Bytes for the gradients that are kept at a time.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If an argument is unknown or out of range, or a fitted curvature has other components.
    """

    def __init__(
        self,
        model: nn.Module,
        curvature: Curvature | None = None,
        target_curvature: TargetKind | Curvature = "empirical",
        loss: Loss = None,
        components: Select | list[Component] = None,
        *,
        group_curvature: GroupCurvature = "sampled",
        draws: int = 1,
        seed: int = 0,
        batch_size: int | None = None,
        memory_budget: int = 2 * 1024**3,
        progress: bool = True,
    ) -> None:
        _check_options(target_curvature, group_curvature, draws, curvature)
        check_bytes(_CALL, "memory_budget", memory_budget)
        self.influence = InfluenceFunction(
            model, curvature, loss, components, batch_size=batch_size, memory_budget=memory_budget, progress=progress
        )
        self.target_curvature, self.group_curvature = target_curvature, group_curvature
        self.seed = seed
        self._rows = GradientRows(self.influence, draws)
        self._fit: _Fit | None = None
        self._kept: GroupEffects | None = None

    @classmethod
    def from_store(
        cls, model: nn.Module, store: Store | str | os.PathLike[str], name: str = "curvature", **options: Any
    ) -> Self:
        """With the factors that a `CurvatureRecorder` left behind, after checking that they are of this model.

        Raises:
            StoreError: If the store belongs to other weights, or has no curvature of that name.
        """
        return cls(model, InfluenceFunction.from_store(model, store, name).curvature, **options)

    @property
    def curvature(self) -> Curvature:
        """H."""
        return self.influence.curvature

    @property
    def components(self) -> list[Component]:
        """The components that count."""
        return self.influence.components

    def fit(self, train: Any, targets: Any, pool: Any = None, *, weight: float | None = None, **options: Any) -> Self:
        """Fit the curvature on the training data, unless it is fitted; take gradient and curvature of the target.

        Args:
            train: Map-style dataset or DataLoader of the n training examples.
            targets: Map-style dataset or DataLoader of the examples whose mean loss is the target f.
            pool: Map-style dataset or DataLoader of the examples that groups are made of; None for the training data.
            weight: Weight of one example in the training objective, 1/n when None.
            **options: Of the fit of the curvature, see `InfluenceFunction.fit`: memory_budget, disk_budget, scratch.

        Returns:
            Itself. Ids of examples are positions in the pool.

        Raises:
            ValueError: If data is empty, a target has nothing supervised or cannot be scored by the model, a loss is
                not finite (ids are named), or the gradients of the targets do not fit into memory.
        """
        size = self.influence.batch_size
        loaders = [ExampleLoader(train, size, what=TRAIN), ExampleLoader(targets, size, what="targets")]
        members = loaders[0] if pool is None else ExampleLoader(pool, size, what="pool rows")
        weight = 1 / loaders[0].num_examples if weight is None else weight
        check_weight(f"{_CALL}.fit", weight)
        self._check(loaders[1], members)
        self._kept = None
        self.influence.fit(loaders[0], **options)
        coordinates = coordinates_of(self.components, self.curvature)
        gradient = self._rows.mean(loaders[1], coordinates)
        rows: dict[Id, int] = {name: row for row, name in enumerate(members.ids)}
        self._fit = _Fit(coordinates, gradient, self._target(coordinates, loaders[1]), members, rows, float(weight))
        return self

    def estimate(self, group: Iterable[Id], method: Method = "N+I", change: Change = "removal") -> float:
        """`estimates` of one group."""
        return float(self.estimates([group], method, change)[0])

    def estimates(self, groups: Iterable[Iterable[Id]], method: Method = "N+I", change: Change = "removal") -> Tensor:
        """Predicted change of the mean target loss for each group, float64 [number of groups] on the CPU.

        Raises:
            NotFittedError: Before `fit`.
            ValueError: As `GroupEffects.estimates`, or if one group alone does not fit into memory.
        """
        return self.table(groups, [method], change)[method]

    def table(
        self, groups: Iterable[Iterable[Id]], methods: Sequence[Method] = METHODS, change: Change = "removal"
    ) -> dict[Method, Tensor]:
        """`estimates` by several methods, which share the gradients and all they have in common."""
        fitted = self._fitted("estimates")
        check_methods(f"{_CALL}.estimates", methods, change, curved=True)
        curved = any({"second", "newton"} & set(TERMS[method]) for method in methods)
        names = [members(_CALL, group) for group in groups]
        for group in names:
            rows_of(_CALL, group, fitted.rows)
        found: dict[Method, list[Tensor]] = {method: [torch.empty(0, dtype=torch.float64)] for method in methods}
        for part in self._parts(names, curved):
            union = dict.fromkeys(name for group in part for name in group) or fitted.pool.ids[:1]
            effects = self._effects(list(union), curved)
            for method, values in effects.table(part, methods, change).items():
                found[method].append(values.cpu())
        return {method: torch.cat(values) for method, values in found.items()}

    def effects(self, ids: Iterable[Id] | None = None) -> GroupEffects:
        """The gradients of some examples of the pool, or of all, with everything that estimates need.

        Raises:
            NotFittedError: Before `fit`.
            ValueError: If an id is unknown or repeated, or they do not fit into memory.
        """
        names = self._named(ids)
        return self._effects(names, curved=True).subset(names)

    def interactions(self, ids: Iterable[Id] | None = None, method: PairMethod = "F+I") -> Interactions:
        """F and K of some examples of the pool, or of all: for pairs, class means, the spectrum and selection rules.

        With "F+I" and a Fisher of the targets (and the draws) no more is kept than the scores of examples x target
        rows.

        Args:
            ids: Of the examples; None for all.
            method: Whose pair terms K has, see `GroupEffects.interactions`.

        Raises:
            NotFittedError: Before `fit`.
            ValueError: If an id is unknown or repeated, they do not fit into memory, or the method is no sum over
                pairs.
        """
        names, target = self._named(ids), self._fitted("interactions").target
        if method != "F+I" or not isinstance(target, TargetRows):
            return self._effects(names, curved=method != "F+I").subset(names).interactions(method)
        parts = ([name for [name] in part] for part in self._parts([[name] for name in names], curved=False))
        found = [self._effects(part, curved=False).subset(part).interactions() for part in parts]
        values, features = torch.cat([part.values for part in found]), torch.cat([part.features for part in found])
        return Interactions(
            values,
            features,
            ids=names,
            weight=found[0].weight,
            target_curvature=target.label,
            damping=self.influence.damping,
            reduction=found[0].reduction,
        )

    def _fitted(self, call: str) -> _Fit:
        if self._fit is None:
            raise NotFittedError(f"`{_CALL}.{call}`: call fit(train, targets) first.")
        return self._fit

    def _named(self, ids: Iterable[Id] | None) -> list[Id]:
        fitted = self._fitted("effects")
        if ids is None:
            return list(fitted.rows)
        names: list[Id] = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        rows_of(_CALL, names, fitted.rows)
        return names

    def _check(self, targets: ExampleLoader, pool: ExampleLoader) -> None:
        """Everything that can be refused by looking at the targets and one example of the pool."""
        self.influence.check(targets, what="targets")
        check_one_loss(f"{_CALL}.fit", self.influence.model, pool, targets, self.influence.loss)
        if "sampled" in (self.target_curvature, self._labels()):
            self.influence.check(ExampleLoader(targets, indices=targets.ids[:1]), labels="sampled")
        self._rows.count(pool, self.group_curvature)

    def _target(self, coordinates: Coordinates, targets: ExampleLoader) -> TargetCurvature:
        model, loss, kind = self.influence.model, self.influence.loss, self.target_curvature
        if isinstance(kind, Curvature):
            if not kind.fitted or not kind.components:
                kind.fit(model, targets, loss, self.components, progress=self.influence.progress)
            if {c.name for c in kind.components} != {c.name for c in self.components}:
                raise ValueError(
                    f"`{_CALL}(target_curvature={kind!r})`: was fitted on other components. Expected those of the "
                    "curvature, or an unfitted one."
                )
            kind.to(next(model.parameters()).device)
            return TargetProduct(lambda rows: coordinates.multiply(kind, rows), repr(kind))
        if kind in PRODUCTS:
            product = PRODUCTS[kind](model, self.components, targets, loss)
            return TargetProduct(lambda rows: coordinates.product(product, rows), kind)
        needed = targets.num_examples * self._rows.bytes(targets, coordinates, kind)
        if needed > self.influence.memory_budget:
            raise ValueError(
                f"`{_CALL}(target_curvature={kind!r})`: the gradients of {targets.num_examples} targets need "
                f"{needed / 1e9:.3g} GB; expected at most memory_budget={self.influence.memory_budget}. Use "
                "target_curvature=EKFAC() or 'gauss-newton', curvature=ProjectedGram(), or fewer components."
            )
        return TargetRows(self._rows.of(targets, coordinates, kind, self.seed), f"{kind} Fisher")

    def _effects(self, names: list[Id], curved: bool) -> GroupEffects:
        """Of some examples at least; the last ones are found again."""
        kept = self._kept
        if kept is not None and set(names) <= set(kept.ids) and (not curved or kept.curved):
            return kept
        fitted = self._fitted("estimates")
        needed = len(names) * self._bytes(curved)
        if needed > self.influence.memory_budget:
            raise ValueError(
                f"`{_CALL}`: the gradients of {len(names)} examples need {needed / 1e9:.3g} GB; expected at most "
                f"memory_budget={self.influence.memory_budget} for a group. Use curvature=ProjectedGram() (LoGra's "
                "projected space), fewer components, or a Fisher of the targets for the interactions of a pool."
            )
        self._kept = None  # before there are others
        coordinates, members = fitted.coordinates, ExampleLoader(fitted.pool, indices=[int(name) for name in names])
        shifts = coordinates.solve(self._rows.of(members, coordinates, "empirical")[:, 0])
        rows = row_shifts = own = None
        if curved and self.group_curvature == "eigenvalues":
            own = self._own(members)
        elif curved:
            rows = self._rows.of(members, coordinates, self.group_curvature, self.curvature.seed)
            row_shifts = coordinates.solve(rows.flatten(0, 1)).reshape(rows.shape)
        self._kept = GroupEffects(
            shifts,
            fitted.target_gradient,
            fitted.target,
            rows,
            row_shifts,
            own,
            ids=names,
            weight=fitted.weight,
            damping=self.influence.damping,
            reduction=loss_for(self.influence.model, fitted.pool, self.influence.loss).reduction,
        )
        return self._kept

    def _own(self, members: ExampleLoader) -> EigenCurvature:
        assert isinstance(self.curvature, KroneckerCurvature)
        whitened = WhitenedGradients(self.components, self.curvature)
        rows = self._rows.of(members, whitened, self._labels(), self.curvature.seed)
        return EigenCurvature(rows[:, 0].square(), whitened.eigenvalues(), whitened.scaled)

    def _labels(self) -> str:
        """Kind of the rows that H_S is made of."""
        if self.group_curvature != "eigenvalues":
            return self.group_curvature
        assert isinstance(self.curvature, KroneckerCurvature)
        return self.curvature.fisher

    def _parts(self, groups: list[list[Id]], curved: bool) -> Iterator[list[list[Id]]]:
        """Consecutive groups whose members fit into memory together; one group at least."""
        limit = self.influence.memory_budget // self._bytes(curved)
        part: list[list[Id]] = []
        union: set[Id] = set()
        for group in groups:
            if part and len(union.union(group)) > limit:
                yield part
                part, union = [], set()
            part.append(group)
            union.update(group)
        if part:
            yield part

    def _bytes(self, curved: bool) -> int:
        """Memory for one example: its gradient, and its curvature's rows before and after H⁻¹."""
        fitted = self._fitted("estimates")
        own = self._rows.bytes(fitted.pool, fitted.coordinates, "empirical")
        return own + (2 * self._rows.bytes(fitted.pool, fitted.coordinates, self.group_curvature) if curved else 0)


def _check_options(target_curvature: object, group_curvature: str, draws: object, curvature: Curvature | None) -> None:
    kinds = ("empirical", "sampled", *PRODUCTS)
    if isinstance(target_curvature, ProjectedGram):
        raise ValueError(
            f"`{_CALL}(target_curvature={target_curvature!r})`: expected 'empirical' or 'sampled', which are Fishers "
            "in the projected space where the curvature is a ProjectedGram, or a curvature of all parameters."
        )
    if not isinstance(target_curvature, Curvature) and target_curvature not in kinds:
        raise ValueError(
            f"`{_CALL}(target_curvature={target_curvature!r})`: expected one of {', '.join(map(repr, kinds))}, or a "
            "Curvature such as EKFAC()."
        )
    if group_curvature not in get_args(GroupCurvature):
        raise ValueError(
            f"`{_CALL}(group_curvature={group_curvature!r})`: expected 'sampled', 'empirical', 'gauss-newton' or "
            "'eigenvalues'."
        )
    if group_curvature == "eigenvalues" and not isinstance(curvature, KroneckerCurvature | None):
        raise ValueError(
            f"`{_CALL}(group_curvature='eigenvalues', curvature={curvature!r})`: expected EKFAC() or KFAC(). Use "
            "'gauss-newton' or 'sampled' for others."
        )
    if type(draws) is not int or draws < 1:
        raise ValueError(f"`{_CALL}(draws={draws!r})`: expected an int >= 1.")
    if group_curvature == "eigenvalues" and draws > 1:
        raise ValueError(f"`{_CALL}(draws={draws}, group_curvature='eigenvalues')`: expected 1, the labels of the fit.")
