"""The models of `less_recipe.py`: the warm-up with its checkpoints, the fine-tunes, and how they are measured."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from less_recipe_data import BATCH, RecipeData
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from llm_demo import LoraChat
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler

from lightning_influence.callbacks import Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Recipe:
    """What all pieces of a run have in common.

    Attributes:
        data: Where rows come from: ``"folder"``, ``"made"`` or ``"quick"``.
        targets: Names.
        pool_rows: Rows to choose from.
        query_rows: Rows of each target to select by.
        held_out_rows: Rows of each target to measure the loss.
        max_tokens: Of a row.
        budget: Rows that are selected.
        warm_up_rows: Random rows of the pool for the warm-up.
        epochs: Of the warm-up; a checkpoint after each.
        steps: Optimizer steps on each selection.
        learning_rate: Of AdamW at the first step of the warm-up, and of tuning unless told otherwise; it falls to 0.
        dimensions: Of the projected gradients of LESS.
        trak_dimensions: Of those of TRAK.
        curvature_rows: Random rows of the pool that the curvature is fitted on; None for all.
        model: Name of the model's folder; None for the one that goes with the data.
        dtype: Of the model's frozen weights.
        warm_up_seed: Of the warm-up that all seeds select by; None for each seed's own.
        landmarks: Rows of the pool that are scored like queries, so that rows are told apart by more than those.
        device: Where models are trained and rows are scored.
        scored_rows: Of a batch that is scored; only rounding depends on it.
    """

    data: str
    targets: tuple[str, ...]
    pool_rows: int
    query_rows: int
    held_out_rows: int
    max_tokens: int
    budget: int
    warm_up_rows: int
    epochs: int
    steps: int
    learning_rate: float
    dimensions: int
    trak_dimensions: int
    curvature_rows: int | None = None
    model: str | None = None
    dtype: str = "float32"
    warm_up_seed: int | None = None
    landmarks: int = 0
    device: str = "cpu"
    scored_rows: int = 8


@dataclass(frozen=True)
class Training:
    """Models of one run.

    Attributes:
        recipe: Sizes.
        data: Pool and held-out rows.
        base: Loads the original model.
        out: Folder of the run.
    """

    recipe: Recipe
    data: RecipeData
    base: Callable[[], PreTrainedModel]
    out: Path

    def original(self, seed: int, steps: int = 1, rate: float | None = None) -> LoraChat:
        """The original model with fresh LoRA weights, the same for a seed."""
        gc.collect()  # a Trainer and its model refer to each other, and a model takes half a gigabyte
        seed_everything(seed, verbose=False)
        return self._placed(LoraChat(self.base(), rate or self.recipe.learning_rate, steps))

    def fine_tuned(self, rows: Sequence[int], seed: int, rate: float | None = None) -> LoraChat:
        """The original model after the steps of the recipe on some rows of the pool, at its rate or another one."""
        model = self.original(seed, self.recipe.steps, rate)
        self._trainer(self.recipe.steps).fit(model.train(), self._loader(rows, seed))
        return self._placed(model)

    def warm(self, seed: int) -> LoraChat:
        """The model at the end of the warm-up, from the file of its LoRA weights."""
        file = self.out / f"seed={seed}" / "warm-up.safetensors"
        if file.exists():
            model = self.original(seed)
            model.load_state_dict(load_file(file), strict=False)
            return model
        model = self._warmed(seed, [])
        weights = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.tmp")
        save_file(weights, unfinished)
        unfinished.rename(file)
        return model

    def warm_up(self, seed: int, recorder: Recorder, folder: Path) -> None:
        """The same warm-up with a recorder at every checkpoint; goes on from the last one of a killed run."""
        checkpoints = folder / "checkpoints"
        found = sorted(checkpoints.glob("*.ckpt"), key=lambda file: file.stat().st_mtime)
        # by steps: from one that was saved when an epoch ended, Lightning 2.6 takes a single step in the next epoch
        saver = ModelCheckpoint(checkpoints, every_n_train_steps=-(-self.recipe.warm_up_rows // BATCH))
        self._warmed(seed, [recorder, saver], found[-1] if found else None)
        if (
            len(recorder.records) < self.recipe.epochs
        ):  # killed after the last checkpoint: no step is left to go on with
            shutil.rmtree(folder)
            self._warmed(seed, [recorder, saver])

    def _warmed(self, seed: int, callbacks: Sequence[Callback], checkpoint: Path | None = None) -> LoraChat:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(self.data.pool), generator=generator)[: self.recipe.warm_up_rows].tolist()
        steps = self.recipe.epochs * -(-len(rows) // BATCH)
        model = self.original(seed, steps)
        self._trainer(steps, callbacks).fit(model.train(), self._loader(rows, seed), ckpt_path=checkpoint)
        return self._placed(model)

    def _loader(self, rows: Sequence[int], seed: int) -> DataLoader[Any]:
        """In an order that depends on seed and epoch alone, so that a warm-up can go on and be run again."""
        part: Subset[Any] = Subset(self.data.pool, sorted(rows))
        order: DistributedSampler[Any] = DistributedSampler(part, num_replicas=1, rank=0, seed=seed)
        return self.data.loader(part, sampler=order)

    @torch.no_grad()
    def losses(self, model: LoraChat, targets: Sequence[str]) -> dict[str, float]:
        """Mean loss of an answer's token over the held-out rows of each target."""
        found = {}
        for target in targets:
            batches = self.data.loader(self.data.held_out[target])
            placed = ({name: part.to(model.device) for name, part in batch.items()} for batch in batches)
            sums = [torch.stack(model.answer_losses(batch)).cpu().double().sum(dim=1) for batch in placed]
            loss, tokens = torch.stack(sums).sum(dim=0).tolist()
            found[target] = loss / tokens
        return found

    def _placed(self, model: LoraChat) -> LoraChat:
        """For measuring, on the device: a Trainer that ends takes a model to the CPU."""
        return model.to(self.recipe.device).eval()

    def _trainer(self, steps: int, callbacks: Sequence[Callback] = ()) -> Trainer:
        kind = torch.device(self.recipe.device).type
        return Trainer(
            max_steps=steps,
            accelerator="gpu" if kind == "cuda" else kind,
            devices=1,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
