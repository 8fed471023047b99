"""A datamodule that serves a pool of training data, or a random part of it, and then the chosen part."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_influence.capture.data_fingerprint import data_fingerprint
from lightning_influence.capture.guard import unchanged
from lightning_influence.capture.losses import Batch, ExampleLoss
from lightning_influence.curvature import Curvature
from lightning_influence.datamodule.chosen import Chosen, checked_weights, plain_positions
from lightning_influence.datamodule.placement import placed
from lightning_influence.datamodule.pool import checked_budget
from lightning_influence.datamodule.recorded_curvature import recorded_curvature
from lightning_influence.datamodule.reselection import Reselection
from lightning_influence.datamodule.served_rows import ServedRows
from lightning_influence.datamodule.target_data import checked_targets, target_data
from lightning_influence.datamodule.warm_up import WarmUp
from lightning_influence.datamodule.wrapper import PlainData, is_datamodule
from lightning_influence.selection import Constraints, Newton, Random, Selection
from lightning_influence.selection.aggregate import Across
from lightning_influence.selection.budget import Budget
from lightning_influence.selection.named_targets import NamedTargets
from lightning_influence.selection.pipeline import (
    Leaks,
    Rule,
    TargetCurvature,
    Weight,
    check_data,
    check_held_out,
    select_training_data,
)


class DataSelector(ServedRows):
    """Wraps training data, chooses among it once a warm-up model is there, and then serves what was chosen.

    Between two fits the choice is made, explicitly::

        selector = DataSelector(datamodule, targets, budget=0.1)
        Trainer(max_epochs=1).fit(warm_up_model, datamodule=selector)      # the whole pool
        selector.select(warm_up_model)
        Trainer(max_epochs=3).fit(fresh_model, datamodule=selector)        # the selection

    The selection is served with the user's own batch size, collate function, workers and shuffling; everything
    else (validation data, transfer hooks, attributes, hyperparameters, state) is the wrapped datamodule's own.
    The second fit needs a new Trainer, as a Trainer counts epochs across fits, and, unless the warm-up weights are
    to be kept, a new model. An epoch of a selection has fewer steps, which schedules counted in epochs will feel:
    compare selections with ``max_steps``. A selection made during a fit counts from the next epoch on, and only
    with ``reload_dataloaders_every_n_epochs=1``; ``reselect_every_n_epochs=n`` makes one every n epochs from the model
    that is being trained, which notices nothing but its new rows. Under several ranks ``select`` is computed on each of
    them, and what rank 0 chose is served.

    Ids are positions in the training dataset. So its order must not change from one ``setup`` to the next: an
    unseeded ``random_split`` there is noticed and refused. State of the wrapped datamodule in a checkpoint that was
    saved without a DataSelector is not found again (Lightning files it under the name of the class).

    Args:
        data: The pool: a LightningDataModule whose ``train_dataloader`` gives one DataLoader, a DataLoader, or a
            map-style dataset (torch or Hugging Face ``datasets``).
        targets: DataLoader or dataset of the examples whose mean loss shall fall, or several by name; None takes the
            validation data. A dataset is put into batches as the pool is.
        budget: Rows as an int, a share of the pool in (0, 1] or a `TokenBudget`; needed for ``select(model)``.
        constraints: What the selection must keep to besides.
        leaks: Of the targets, what is done about pool rows that stand there too: "warn", "refuse" or "exclude".
        target_weights: Of targets by name, see `select_training_data`.
        across: The same.
        rule: None for ``"newton"``, that is ``Newton()``, or for ``InteractionGreedy()`` where a ``weight`` is given.
            ``Newton(ridge="saturate")`` is for a fit of an epoch or two on the selection; with
            ``Newton(ridge="held-out")`` held-out targets choose the ridge, and ``selection.held_out`` tells how.
        curvature: None for ``EKFAC()``.
        components: Which parameters, see `find_components`; None for everything trainable.
        loss: Loss of one example, see `resolve_loss`.
        weight: Of one selected row in the training objective, see `select_training_data`; ``"held-out"`` as above.
        folds: Of ``weight="held-out"``: parts of the targets, each of which is held out once; None for 5. `Newton` has
            its own.
        target_curvature: Labels of the Fisher of the targets: their own, or sampled from the model.
        normalise: Whether gradients are scaled to unit length first.
        selection: Positions, or the path of a file written by `save`, which is read when a fit begins.
        warmup: What a fit sees before there is a selection: a random part of the pool, as a number of rows or a share
            (LESS takes 0.05), see ``warmup_ids``; None for the whole pool. Recorders and ``select`` look at the whole
            pool all the same.
        reselect_every_n_epochs: Choose again at the start of the epochs n, 2n, ... of a fit; None for never. Needs
            ``budget`` and ``Trainer(reload_dataloaders_every_n_epochs=1)``. By the Newton step with the same landmarks
            every time, whose gradients are taken anew, as all are.
        weights: ``"gains"`` for selections whose rows are drawn in proportion to their predicted gains, see `weigh`.
        seed: Of the random part, and of landmarks and labels drawn when choosing during a fit.
        val: DataLoader or dataset for validation, when ``data`` is not a datamodule.
        batch_size: Of the pool and the validation data, where they are plain datasets.
        collate_fn: The same.
        num_workers: The same.
        loader_fn: Makes a DataLoader of the selected part of the dataset, for loaders that cannot be rebuilt
            (custom samplers, subclasses of DataLoader).

    Raises:
        ValueError: If an argument does not fit the data.
    """

    def __init__(
        self,
        data: Any,
        targets: Any = None,
        budget: Budget | None = None,
        *,
        constraints: Constraints | None = None,
        leaks: Leaks = "warn",
        target_weights: dict[str, float] | None = None,
        across: Across = "mean",
        rule: Rule | None = None,
        curvature: Curvature | None = None,
        components: str | list[str] | Callable[[str, nn.Module], bool] | None = None,
        loss: ExampleLoss | Callable[[nn.Module, Batch], Tensor] | None = None,
        weight: Weight = "saturate",
        folds: int | None = None,
        target_curvature: TargetCurvature = "empirical",
        normalise: bool = True,
        selection: list[int] | str | None = None,
        warmup: int | float | None = None,
        reselect_every_n_epochs: int | None = None,
        weights: Literal["gains"] | None = None,
        seed: int = 0,
        val: Any = None,
        batch_size: int = 32,
        collate_fn: Callable[..., Any] | None = None,
        num_workers: int = 0,
        loader_fn: Callable[..., Any] | None = None,
    ) -> None:
        settings = {"batch_size": batch_size, "collate_fn": collate_fn, "num_workers": num_workers}
        if val is not None and is_datamodule(data):
            raise ValueError("`DataSelector(val=...)`: the datamodule has its own validation data; leave `val` out.")
        inner = data if is_datamodule(data) else PlainData(data, val, settings)
        budget = checked_budget("DataSelector", budget)
        part = None if warmup is None else WarmUp(warmup, seed)
        super().__init__(inner, budget, part, loader_fn, is_set_up=inner is not data, constraints=constraints)
        self._targets = None if targets is None else checked_targets(targets)
        self._options: dict[str, Any] = {
            "constraints": constraints,
            "leaks": leaks,
            "target_weights": target_weights,
            "across": across,
            "rule": rule,
            "curvature": curvature,
            "components": components,
            "loss": loss,
            "weight": weight,
            "folds": folds,
            "target_curvature": target_curvature,
            "normalise": normalise,
        }
        self._seed = Random(seed).seed
        self._weights = checked_weights(weights)
        every = reselect_every_n_epochs
        self._reselection = None if every is None else Reselection(every, self._budget, curvature)
        if isinstance(selection, str | os.PathLike):
            self._file = os.fspath(selection)
        elif selection is not None:
            self.select(ids=selection)

    @overload
    def select(
        self,
        model: nn.Module,
        ids: None = None,
        *,
        budget: Budget | None = None,
        rule: Rule | None = None,
        loss: ExampleLoss | Callable[[nn.Module, Batch], Tensor] | None = None,
        store: str | os.PathLike[str] | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> Selection: ...

    @overload
    def select(self, model: None = None, ids: Sequence[int] = ...) -> None: ...

    def select(
        self,
        model: nn.Module | None = None,
        ids: Sequence[int] | None = None,
        *,
        budget: Budget | None = None,
        rule: Rule | None = None,
        loss: ExampleLoss | Callable[[nn.Module, Batch], Tensor] | None = None,
        store: str | os.PathLike[str] | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> Selection | None:
        """Choose what the next fit trains on.

        Batches go through the transfer hooks of the datamodule, or of the module, as in a fit, and for a model that the
        Trainer has trained into its precision. A hook that draws, as for augmentation, draws anew in every pass.

        Args:
            model: The warm-up model, from which the choice is computed. Left as it was; its ``self.log`` does nothing
                meanwhile.
            ids: Positions chosen elsewhere, instead of a model.
            budget: Instead of the selector's own.
            rule: Instead of the selector's own.
            loss: Instead of the selector's own. Where a recorder fell back to ``training_step``, which is not run
                here, pass the loss that it found and tried out: ``recorder.settled_loss``.
            store: Folder of a recording of `CurvatureRecorder`, whose factors are used instead of fitting new
                ones; it must be of the weights the model has now.
            batch_size: Examples per batch of the passes; None takes the loader's.
            seed: Of landmarks and of sampled labels.
            progress: Whether to show progress bars.

        Returns:
            The selection in pick order, or None for given ids.

        Raises:
            ValueError: If neither or both are given, there is no budget or no target, or ids do not fit.
            StoreError: If the store belongs to other weights or components.
        """
        if (model is None) == (ids is None):
            raise ValueError("`DataSelector.select()`: expected a model, or `ids=`, and not both.")
        if ids is not None:
            self._serve(Chosen(plain_positions(ids)))
            return None
        assert model is not None
        budget = self._budget if budget is None else checked_budget("DataSelector.select", budget)
        if budget is None:
            raise ValueError("`DataSelector(budget=None)`: expected an int >= 1 or a fraction in (0, 1] to select.")
        given = {"rule": rule, "loss": loss}
        options = self._options | {name: value for name, value in given.items() if value is not None}
        if options["curvature"] is not None and not options["curvature"].fitted:
            options["curvature"] = copy.deepcopy(options["curvature"])  # fitted to this model, and not to the next one
        if store is not None:
            options["curvature"] = recorded_curvature(store, model, options["components"])
        pool, rows, goals = self._seen_by(model)
        with unchanged(model):
            selection = select_training_data(
                model,
                rows,
                goals,
                budget=budget,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
                **options,
            )
        chosen = Chosen.of(selection, data_fingerprint(pool.dataset))
        self._serve(chosen if self._weights is None else chosen.weighed(self._weights))
        return selection

    def _seen_by(self, model: nn.Module) -> tuple[DataLoader[Any], Any, Any]:
        """The loader of the pool, and rows and targets as a fit of the model would hand them over."""
        pool = self.pool_dataloader()
        goals = target_data(self._targets, pool, self._inner)
        rows, goals = (placed(data, model, self._inner, self._trainer) for data in (pool, goals))
        return pool, rows, goals

    def _look(self, model: nn.Module) -> None:
        """Make sure that a choice can be made with a model, by a batch of the targets."""
        _, rows, goals = self._seen_by(model)
        names = ("curvature", "components", "loss", "target_curvature", "normalise")
        check_data(model, rows, goals, **{name: self._options[name] for name in names})

    def train_dataloader(self) -> Any:
        """The pool's loader as it is, or one like it over the rows that the fit shall see now."""
        if self._reselection is not None:
            self._reselection.check(self._trainer, self._look)
        if self._reselection is not None and self._reselection.is_due(self._trainer):
            self.select(self._trainer.lightning_module, seed=self._seed, progress=False)
            self._reselection.epoch = self._trainer.current_epoch
        return super().train_dataloader()

    def setup(self, stage: str) -> None:
        """Set the data up, and read the selection file before a fit."""
        super().setup(stage)
        if stage != "fit":
            return
        if self._reselection is not None:
            self._reselection.begin(self._trainer)
        if self._reselection is not None or (self._chosen is None and self._holds_out):
            self._check_targets()

    @property
    def _holds_out(self) -> bool:
        rule, weight = self._options["rule"], self._options["weight"]
        return weight == "held-out" or (isinstance(rule, Newton) and rule.ridge == "held-out")

    def _check_targets(self) -> None:
        """That there are targets, and enough of them where some are held out, told before the warm-up."""
        goals = target_data(self._targets, self.pool_dataloader(), self._inner)
        if not self._holds_out:
            return
        rule, weight, folds, factors, across = (
            self._options[name] for name in ("rule", "weight", "folds", "target_weights", "across")
        )
        check_held_out("DataSelector", rule, weight, folds, NamedTargets("DataSelector", goals, factors, across))

    def state_dict(self) -> dict[str, Any]:
        """Selection, warm-up part and the wrapped datamodule's state, the former two as plain JSON."""
        return {**super().state_dict(), "reselected": None if self._reselection is None else self._reselection.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them; a selection that was made since wins over the one in the checkpoint.

        Not so if that was made in the fit which is being resumed.
        """
        reselected = state_dict.get("reselected")
        if self._reselection is not None and reselected is not None and state_dict["selection"] is not None:
            self._reselection.epoch = reselected
            self.clear()  # what was chosen before this fit has been replaced in it
        super().load_state_dict(state_dict)
