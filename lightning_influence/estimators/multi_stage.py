"""Influence of pre-training examples on a fine-tuned model ([MS] section 4)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from typing_extensions import Self

from lightning_influence.capture import Component, ExampleLoader, find_components
from lightning_influence.capture.component import Select
from lightning_influence.capture.finite import NanPolicy, check_nan_policy
from lightning_influence.capture.layers.base import widened
from lightning_influence.curvature import EKFAC, Curvature
from lightning_influence.curvature.base import loss_for
from lightning_influence.errors import NotFittedError
from lightning_influence.estimators.base import Estimator, Labels, Loss, damping_label
from lightning_influence.estimators.gradient_dot import GradientDot
from lightning_influence.estimators.merged import adapted
from lightning_influence.estimators.queries import warn_of_changed
from lightning_influence.estimators.shared import Match, distance, is_inner, match_components
from lightning_influence.store import Store


class Distance(NamedTuple):
    """How far fine-tuning moved the parameters of a component.

    Attributes:
        absolute: ``|θ_ft - θ_pt|``.
        relative: The same over ``|θ_pt|``.
    """

    absolute: float
    relative: float


class MultiStageInfluence(Estimator):
    """``I(z, x) = g_x(θ_ft)^T (G_ft + λ_ft I)^{-1} (G_pt + λ_pt I)^{-1} g_z(θ_pt)`` ([MS] eq. 12), block by block.

    What training example z of the pre-training does to query x of the fine-tuned model: the fine-tuned parameters are
    taken to stay near the pre-trained ones, with the weight of that proximity in λ_ft. Score > 0: adding z to the
    pre-training lowers the query's loss. A query's gradient is solved for with both curvatures once; gradients of
    the pre-training examples are only contracted with it.

    The sum runs over the components that both models share: alike in kind and shape, and named alike (`match`). By
    default heads (unembedding, classifier) and normalisation layers are left out, as in [MS]. Each block is solved on
    its own, also by a curvature that couples components.

    Args:
        pretrained: The model whose training examples are asked about.
        finetuned: The model that answers the queries. With LoRA adapters of peft, merge a copy first: `merged`.
        pretrained_curvature: G_pt; None for ``EKFAC()``. Fitted by `fit` unless it is already.
        finetuned_curvature: G_ft; likewise. An object of its own, not that of the pre-trained model.
        loss: Per-example loss of the pre-training examples; None resolves it.
        query_loss: What is measured of the queries, any differentiable function of them; None takes
            ``finetuning_loss``. No curvature depends on it.
        components: What `find_components` takes, in the pre-trained model; None for the default above, within those of
            fitted curvatures. Anything named is used, heads and normalisation too.
        match: Names in the pre-trained model to names in the fine-tuned one, as a mapping, or a function that returns
            None for no counterpart. None: equal but for a prefix.
        finetuning_loss: Per-example loss that the fine-tuned model was trained on, for its curvature; None resolves it
            from model and batch.
        **options: Those of `Estimator`.

    Attributes:
        shared: Pairs of components, (pre-trained, fine-tuned).

    Raises:
        ValueError: If no component is shared, a component asked for is not, a fitted curvature lacks one, or adapters
            are not merged.
    """

    one_model = False

    def __init__(
        self,
        pretrained: nn.Module,
        finetuned: nn.Module,
        pretrained_curvature: Curvature | None = None,
        finetuned_curvature: Curvature | None = None,
        loss: Loss = None,
        query_loss: Loss = None,
        components: Select | list[Component] = None,
        *,
        match: Match = None,
        finetuning_loss: Loss = None,
        **options: Any,
    ) -> None:
        self.curvature = EKFAC() if pretrained_curvature is None else pretrained_curvature
        self.finetuned_curvature = EKFAC() if finetuned_curvature is None else finetuned_curvature
        if self.curvature is self.finetuned_curvature and self.curvature.num_passes:
            raise ValueError(
                "`MultiStageInfluence(pretrained_curvature, finetuned_curvature)`: expected two objects, one for each "
                "model; the second fit would replace the first."
            )
        _check_merged(pretrained, finetuned)
        for model, curvature in ((pretrained, self.curvature), (finetuned, self.finetuned_curvature)):
            curvature.to(next(model.parameters()).device)
        self.finetuned = finetuned
        self.shared = self._find(pretrained, finetuned, components, match)
        super().__init__(pretrained, loss, [one for one, _ in self.shared], **options)
        others = [other for _, other in self.shared]
        self._asked = GradientDot(finetuned, finetuning_loss, others, query_loss=query_loss, **options)
        kinds = " and ".join(type(c).__name__ for c in (self.finetuned_curvature, self.curvature))
        self.formula = f"g_q(ft)^T (G_ft + damping)^-1 (G_pt + damping)^-1 g_i(pt), G_ft and G_pt: {kinds}"

    @classmethod
    def from_stores(
        cls,
        pretrained: nn.Module,
        finetuned: nn.Module,
        pretrained_store: Store | str | os.PathLike[str],
        finetuned_store: Store | str | os.PathLike[str],
        name: str = "curvature",
        **options: Any,
    ) -> Self:
        """With the factors that a `CurvatureRecorder` left behind in each of two runs.

        Five lines, with a recorder among the callbacks of the pre-training and one among those of the fine-tuning::

            first, second = (recorder.records[-1].path for recorder in (pretraining, finetuning))
            influence = MultiStageInfluence.from_stores(pretrained, finetuned, first, second)
            scores = influence.score(queries, pretraining_data)
            scores.top(10)
            influence.proximity()

        Raises:
            StoreError: If a store belongs to other weights than its model, or has no curvature of that name.
        """
        first, second = _recorded(pretrained, pretrained_store, name), _recorded(finetuned, finetuned_store, name)
        return cls(pretrained, finetuned, first, second, **options)

    @property
    def damping(self) -> str | None:
        """Damping of the two curvatures, where they have one."""
        one, other = (damping_label(c) for c in (self.curvature, self.finetuned_curvature))
        return one if one == other else f"pre-training: {one}, fine-tuning: {other}"

    def fit(
        self,
        pretraining: Any,
        finetuning: Any,
        *,
        nan_policy: NanPolicy = "raise",
        memory_budget: int = 0,
        disk_budget: int = 0,
        scratch: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Fit each curvature on the data of its stage, unless it is fitted already.

        Args:
            pretraining: Map-style dataset or DataLoader of the first stage.
            finetuning: Likewise of the second.
            nan_policy: ``"omit"`` leaves out examples whose loss is not finite, see `Curvature.fit`.
            memory_budget: As in `Curvature.fit`: what is kept of the first pass for the second, for one stage after
                the other.
            disk_budget: The same in temporary files.
            scratch: Folder for these files; None takes the system's.
        """
        check_nan_policy("MultiStageInfluence.fit", nan_policy)
        for stage, curvature, data in (
            (self, self.curvature, pretraining),
            (self._asked, self.finetuned_curvature, finetuning),
        ):
            if not curvature.fitted:
                curvature.fit(
                    stage.model,
                    self._loader(data),
                    stage.loss,
                    stage.components,
                    progress=self.progress,
                    nan_policy=nan_policy,
                    memory_budget=memory_budget,
                    disk_budget=disk_budget,
                    scratch=scratch,
                )
        return self

    def proximity(self) -> dict[str, Distance]:
        """How far fine-tuning moved each shared component, by its name in the pre-trained model.

        The formula assumes that fine-tuning ended near where it began; a relative distance that is not small says
        where this is in doubt.
        """
        found = {}
        for one, other in self.shared:
            moved, norm = distance((self.model, one), (self.finetuned, other))
            found[one.name] = Distance(moved, moved / norm if norm else float("inf") if moved else 0.0)
        return found

    def transform(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``(G_pt + λ_pt)^{-1} (G_ft + λ_ft)^{-1} g_x`` by the names of the pre-trained model."""
        stages = (("pre-trained", self.curvature), ("fine-tuned", self.finetuned_curvature))
        unfitted = [f"{type(c).__name__} of the {which} model" for which, c in stages if not c.fitted]
        if unfitted:
            raise NotFittedError(
                f"`MultiStageInfluence.score`: not fitted yet: {' and '.join(unfitted)}. Call fit(pretraining, "
                "finetuning) first, or read recorded factors with MultiStageInfluence.from_stores(...)."
            )
        warn_of_changed("MultiStageInfluence", self.curvature, self.model, "the pre-trained model")
        warn_of_changed("MultiStageInfluence", self.finetuned_curvature, self.finetuned, "the fine-tuned model")
        solved = {}
        for one, other in self.shared:
            half = self.finetuned_curvature.solve(other, gradients[other.name])
            own = widened(self.model.get_parameter(one.parameters[0]).new_empty(0))
            solved[one.name] = self.curvature.solve(one, half.to(own))
        return solved

    def check(self, queries: Any, labels: Labels = "data", seed: int = 0, *, what: str = "queries") -> None:
        """As `Estimator.check`, with the fine-tuned model."""
        self._asked.check(self._loader(queries), labels, seed, what=what)

    def _find(
        self, pretrained: nn.Module, finetuned: nn.Module, components: Select | list[Component], match: Match
    ) -> list[tuple[Component, Component]]:
        known, others = _known(pretrained, self.curvature), _known(finetuned, self.finetuned_curvature)
        asked = None if components is None else _asked_for(pretrained, components)
        left = known if asked is None else _among(asked, known, self.curvature)
        pairs = match_components(left, others, match)
        if asked is None and match is None:
            pairs = [(a, b) for a, b in pairs if is_inner(pretrained, a) and is_inner(finetuned, b)]
        missing = [] if asked is None else sorted({c.name for c in left} - {a.name for a, _ in pairs})
        if missing or not pairs:
            what = f"{missing[:8]} of components= lack" if missing else "no component of the first has"
            raise ValueError(
                f"`MultiStageInfluence({type(pretrained).__name__}, {type(finetuned).__name__})`: {what} a counterpart "
                "in the second: of the same kind and shape, and with a name that is equal but for a prefix. Heads and "
                f"normalisation layers are left out unless named. The first has {[c.name for c in known][:6]}, the "
                f"second {[c.name for c in others][:6]}. Give match= to name counterparts."
            )
        return pairs

    def _check_queries(self, queries: ExampleLoader) -> None:
        self._asked._check_queries(queries)

    def _reduction(self, queries: ExampleLoader, train: ExampleLoader) -> str:
        asked = loss_for(self.finetuned, queries, self._asked.asked).reduction
        own = loss_for(self.model, train, self.loss).reduction
        return own if own == asked else f"query: {asked}, training example: {own}"

    def _own_gradients(self, loader: ExampleLoader, labels: Labels, seed: int) -> dict[str, Tensor]:
        return self._asked._own_gradients(loader, labels, seed)


def _known(model: nn.Module, curvature: Curvature) -> list[Component]:
    fitted = curvature.fitted and curvature.components
    return list(curvature.components) if fitted else find_components(model)


def _asked_for(model: nn.Module, components: Any) -> list[Component]:
    given = components if isinstance(components, str) or callable(components) else list(components)
    if isinstance(given, list) and given and all(isinstance(c, Component) for c in given):
        return given
    return find_components(model, given)


def _among(asked: list[Component], known: list[Component], curvature: Curvature) -> list[Component]:
    """The components asked for, after checking that a fitted curvature has them."""
    if not (curvature.fitted and curvature.components):
        return asked
    lacking = [c.name for c in asked if c not in known]
    if lacking:
        raise ValueError(
            f"`MultiStageInfluence(components=...)`: the fitted {type(curvature).__name__} of the pre-trained model "
            f"lacks {lacking[:8]}; expected some of {[c.name for c in known][:8]}. Leave components out, or fit again."
        )
    return asked


def _check_merged(pretrained: nn.Module, finetuned: nn.Module) -> None:
    for name, model in (("pretrained", pretrained), ("finetuned", finetuned)):
        layers = adapted(model)
        if layers:
            raise ValueError(
                f"`MultiStageInfluence({name}={type(model).__name__})`: {len(layers)} layers carry LoRA adapters "
                f"({layers[:3]}), which the other model lacks. Expected plain weights: merged(model) gives a copy "
                "with the adapters added to them; fit its curvature on that copy."
            )


def _recorded(model: nn.Module, store: Store | str | os.PathLike[str], name: str) -> Curvature:
    found = store if isinstance(store, Store) else Store.open(Path(store))
    found.verify(model=model)
    return found.read_curvature(name, device=str(next(model.parameters()).device))
