"""Choose a tenth of an instruction pool for one task and fine-tune a language model on it.

    python examples/llm_demo.py [--quick] [--seed 0] [--out runs/demo-llm]

SmolLM2-135M-Instruct, 300 instruction rows from ten task families, and one of these families as the target: a few
of its rows stand in the pool, others say what is wanted, others still measure the loss. LoRA is warmed up on a
random part of the pool; the gradients of the warm-up model choose 10 per cent of it; the original model is
fine-tuned again on that choice, on additive influence's and on a random one, all for the same number of steps.
"""

from __future__ import annotations

import argparse
import gc
import logging
import resource
import shlex
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from instruction_pool import FAMILIES, IGNORED, InstructionDataset, PadRight, instruction_rows
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from llm_report import Arm, Run, write_report
from peft import LoraConfig, get_peft_model
from smollm2 import load_smollm2
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils.logging import disable_progress_bar

from lightning_influence import (
    DataSelector,
    GradientDotRecorder,
    InteractionGreedy,
    Interactions,
    Random,
    Scores,
    Selection,
    SelectionRule,
    Store,
    TopK,
)
from lightning_influence.callbacks import Record
from lightning_influence.selection.pipeline import choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
BATCH = 4  # more rows at a time are hardly faster, and their logits are large: 49,152 per token


class LoraChat(LightningModule):
    """The original model with fresh LoRA weights; AdamW with a learning rate that falls to zero."""

    def __init__(self, base: PreTrainedModel, learning_rate: float, steps: int) -> None:
        super().__init__()
        self.model = get_peft_model(base.train(), LoraConfig(**LORA, task_type="CAUSAL_LM"))
        self.learning_rate = learning_rate
        self.steps = steps

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        losses, tokens = self.answer_losses(batch)
        return losses.sum() / tokens.sum()

    def answer_losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed loss of each row's answer [n] and its number of tokens [n].

        Logits are computed only where some row of the batch is supervised, which saves a sixth of the time.
        """
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # position t predicts token t + 1
        kept = (labels != IGNORED).any(dim=0).nonzero().flatten()
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        logits = self.model(**inputs, logits_to_keep=kept, use_cache=False).logits  # [n, kept, V]
        labels = labels[:, kept]
        each = {"ignore_index": IGNORED, "reduction": "none"}  # logits of a token side by side, which is quicker
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), **each).view_as(labels)
        return losses.sum(dim=1), (labels != IGNORED).sum(dim=1)

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


@dataclass(frozen=True)
class Instructions:
    """The rows in three parts that share none: to choose from, to say what is wanted, to measure the loss."""

    pool: InstructionDataset
    targets: InstructionDataset
    held_out: InstructionDataset
    pad: PadRight

    @classmethod
    def make(cls, run: Run) -> Instructions:
        _, tokenizer = load_smollm2(run.cache)
        first, second = run.pool_rows, run.pool_rows + run.target_rows
        wanted = instruction_rows([run.target], second + run.held_out_rows, run.seed)
        others = instruction_rows([f for f in FAMILIES if f != run.target], run.pool_rows, run.seed)
        parts = (wanted[:first] + others, wanted[first:second], wanted[second:])
        return cls(*(InstructionDataset(part, tokenizer) for part in parts), PadRight(tokenizer.pad_token_id))

    def describe(self, position: int) -> dict[str, Any]:
        """What a reader of a selection wants to know about one of its rows."""
        row = self.pool.rows[position]
        return {"row": row.id, "family": row.family, "question": row.question, "answer": row.answer}

    def loader(self, part: InstructionDataset, shuffle: bool = False) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(part, BATCH, shuffle=shuffle, collate_fn=self.pad)


def fine_tune(run: Run, data: DataSelector, steps: int, callbacks: Sequence[Callback] = ()) -> LoraChat:
    """The original model, trained on what the selector serves now; every call starts from the same LoRA weights."""
    gc.collect()  # a Trainer and its model refer to each other, and a model takes half a gigabyte
    seed_everything(run.seed, verbose=False)
    model = LoraChat(load_smollm2(run.cache)[0], run.learning_rate, steps)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    return model.eval()


def recorder(data: Instructions, run: Run) -> GradientDotRecorder:
    """Cosines of the LoRA gradients of every target row with every row of the pool, by component, after warm-up."""
    return GradientDotRecorder(
        data.loader(data.targets),
        train=data.loader(data.pool),
        components="lora",
        normalise=True,
        when="fit_end",
        dirpath=str(run.out / "influence"),
    )


def select(record: Record, run: Run) -> Iterator[tuple[str, Selection]]:
    """Every rule's choice, from what was recorded during the warm-up."""
    interactions = Interactions.from_scores(Scores.load(Store.open(record.path)), 1 / run.budget)
    rules: dict[str, SelectionRule] = {
        "interaction-aware": InteractionGreedy(),
        "additive": TopK(),
        "random": Random(run.seed),
    }
    for method, rule in rules.items():
        yield method, choose(interactions, rule, run.budget)


@torch.no_grad()
def target_loss(model: LoraChat, data: Instructions) -> float:
    """Mean loss of an answer's token over the held-out rows of the target family."""
    sums = [torch.stack(model.answer_losses(batch)).sum(dim=1) for batch in data.loader(data.held_out)]
    loss, tokens = torch.stack(sums).sum(dim=0).tolist()
    return float(loss / tokens)


def demo(run: Run, data: Instructions) -> Iterator[Arm]:
    """Warm up, select, fine-tune the original model again on each selection."""
    say = Stages()
    selector = DataSelector(data.loader(data.pool, shuffle=True))
    generator = torch.Generator().manual_seed(run.seed)
    drawn = torch.randperm(len(data.pool), generator=generator)[: run.warm_up_rows]
    yield Arm("untouched model", target_loss(LoraChat(load_smollm2(run.cache)[0], run.learning_rate, 1).eval(), data))
    selector.select(ids=drawn.tolist())
    dots = recorder(data, run)
    warm = fine_tune(run, selector, run.warm_up_steps, [dots])
    selector.clear()
    yield Arm(f"warm-up ({run.warm_up_rows} random rows)", target_loss(warm, data))
    del warm
    say.done(
        f"warm-up of {run.warm_up_steps} steps, and {len(data.pool)} rows recorded for {len(data.targets)} targets"
    )

    selections = list(select(dots.records[-1], run))
    say.done(f"{len(selections)} selections of {run.budget} rows")

    for method, selection in selections:
        selector.use(selection)
        loss = target_loss(fine_tune(run, selector, run.steps), data)
        yield Arm(method, loss, selection, tuple(data.describe(k) for k in selection.positions))
        say.done(f"{method}: original model fine-tuned for {run.steps} steps, target loss {loss:.3f}")


class Stages:
    """One printed line for each stage, with its time and the memory it took."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def done(self, stage: str) -> None:
        now = time.perf_counter()
        print(f"{stage} ({now - self.started:.0f} s, peak memory {peak_memory():.1f} GB)", flush=True)
        self.started = now


def peak_memory() -> float:
    """Largest resident set of this process so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def parse(arguments: list[str]) -> Run:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a third of the rows and steps")
    parser.add_argument("--seed", type=int, default=0, help="of rows, LoRA weights and order")
    parser.add_argument("--target", choices=FAMILIES, default=FAMILIES[0], help="task family whose loss shall fall")
    parser.add_argument("--out", type=Path, default=Path("runs/demo-llm"), help="folder for everything written")
    parser.add_argument("--cache", type=Path, default=Path("runs/models"), help="folder for the model's weights")
    options = parser.parse_args(arguments)
    sizes = {"pool_rows": 10, "target_rows": 6, "held_out_rows": 12} if options.quick else {}
    steps = {"warm_up_rows": 20, "warm_up_steps": 5, "steps": 6} if options.quick else {}
    return Run(
        seed=options.seed,
        target=options.target,
        families=FAMILIES,
        out=options.out,
        cache=options.cache,
        command=shlex.join(["python", "examples/llm_demo.py", *arguments]),
        **sizes,
        **steps,
    )


def silence() -> None:
    """Notes on each of several short fits are left out, and a bar for each loading of the weights."""
    disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", "The number of training batches")
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    run = parse(arguments)
    silence()
    data = Instructions.make(run)
    print(f"{len(data.pool)} rows in the pool; too long and left out: {dict(data.pool.too_long) or 'none'}")
    arms = list(demo(run, data))
    families = Counter(row.family for row in data.pool.rows)
    print(write_report(run, arms, families, time.perf_counter() - started, peak_memory()))


if __name__ == "__main__":
    main(sys.argv[1:])
