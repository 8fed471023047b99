"""Results of the language model demo as tables, files and one page of text."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_influence import Selection

PACKAGES = ("torch", "lightning", "transformers", "peft", "reasoning-gym")
TOP = 8


@dataclass(frozen=True)
class Run:
    """What was asked for.

    Attributes:
        seed: Of rows, LoRA weights and order.
        target: Task family whose loss shall fall.
        families: Task families of the pool, the target among them.
        out: Folder for everything written.
        cache: Folder for the model's weights.
        command: The command line.
        pool_rows: Rows of each family in the pool.
        target_rows: Rows of the target family that say what is wanted.
        held_out_rows: Rows of the target family that measure the loss.
        warm_up_rows: Random rows of the pool for the warm-up.
        warm_up_steps: Its optimizer steps.
        steps: Optimizer steps on each selection.
        learning_rate: Of AdamW at the first step.
    """

    seed: int
    target: str
    families: tuple[str, ...]
    out: Path
    cache: Path
    command: str
    pool_rows: int = 30
    target_rows: int = 20
    held_out_rows: int = 40
    warm_up_rows: int = 40
    warm_up_steps: int = 20
    steps: int = 24
    learning_rate: float = 5e-4

    @property
    def budget(self) -> int:
        """A tenth of the pool."""
        return max(1, self.pool_rows * len(self.families) // 10)


@dataclass(frozen=True)
class Arm:
    """One model. Loss: mean over answer tokens of the held-out target rows; rows in pick order."""

    name: str
    loss: float
    selection: Selection | None = None
    rows: tuple[dict[str, Any], ...] = ()

    def composition(self) -> Counter[str]:
        """Number of selected rows of each family."""
        return Counter(str(row["family"]) for row in self.rows)


def write_report(run: Run, arms: Sequence[Arm], pool: Counter[str], seconds: float, memory: float) -> str:
    """Write summary, selections and composition into the folder of the run, and return the summary."""
    run.out.mkdir(parents=True, exist_ok=True)
    chosen = {arm.name: arm for arm in arms if arm.selection is not None}
    for name, arm in chosen.items():
        file = "selection.jsonl" if name == "interaction-aware" else f"selection-{name}.jsonl"
        write_selection(arm, run.out / file)
    with (run.out / "composition.csv").open("w", newline="") as file_:
        csv.writer(file_).writerows(composition(pool, list(chosen.values())))
    losses = {arm.name: arm.loss for arm in arms}
    result = {"target_loss": losses, "seconds": round(seconds), "peak_memory_gb": round(memory, 2), "seed": run.seed}
    (run.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    text = summary(run, arms, pool, seconds, memory)
    (run.out / "summary.md").write_text(text)
    return text


def write_selection(arm: Arm, path: Path) -> None:
    """One JSON line per pick, with its scores and its text."""
    assert arm.selection is not None
    rows = dict(zip(arm.selection.ids, arm.rows, strict=True))
    arm.selection.to_jsonl(path, lambda name: rows[name])


def composition(pool: Counter[str], arms: Sequence[Arm]) -> list[list[str]]:
    """Rows of each family in the pool and in each selection, by their number in the first; a header before."""
    counts = [pool, *(arm.composition() for arm in arms)]
    order = sorted(pool, key=lambda family: (-counts[1][family], family))
    head = ["family", "pool", *(arm.name for arm in arms)]
    return [head, *([family, *(str(count[family]) for count in counts)] for family in order)]


def summary(run: Run, arms: Sequence[Arm], pool: Counter[str], seconds: float, memory: float) -> str:
    """One page of Markdown."""
    chosen = [arm for arm in arms if arm.selection is not None]
    losses = [["model", "target loss"], *([arm.name, f"{arm.loss:.3f}"] for arm in arms)]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"""# SmolLM2-135M: fine-tune on a tenth of the pool

Target: {run.target}. The pool holds {sum(pool.values())} rows of {len(run.families)} task families, the target among
them; {run.target_rows} other rows of the target say what is wanted, and {run.held_out_rows} more measure the loss, per
answer token. After a warm-up on {run.warm_up_rows} random rows ({run.warm_up_steps} steps), {run.budget} rows are
chosen by the gradients of the LoRA weights. Then the original model is fine-tuned on each choice for {run.steps} steps.

{table(losses)}

One seed: two random choices differ by a tenth or two.

## What was chosen

{table(composition(pool, chosen))}

## The first rows of the interaction-aware selection

A negative gain lowers the predicted target loss; half of all that is gained after {half(chosen[0])} rows.

{table(top_rows(chosen[0]))}

Files: `selection.jsonl` (rows in pick order, with scores; the others beside it), `composition.csv`, `results.json`.

`{run.command}`: {seconds:.0f} s, {memory:.1f} GB, {versions}.
"""


def top_rows(arm: Arm) -> list[list[str]]:
    """The first picks with their gains, and a header."""
    assert arm.selection is not None
    head = ["row", "gain", "first order", "interaction", "question", "answer"]
    parts = zip(
        arm.rows,
        arm.selection.gains.tolist(),
        arm.selection.first_order.tolist(),
        arm.selection.interaction.tolist(),
        strict=True,
    )
    lines = [
        [str(row["row"]), *(f"{number:+.4f}" for number in numbers), _short(row["question"]), _short(row["answer"])]
        for row, *numbers in parts
    ]
    return [head, *lines[:TOP]]


def half(arm: Arm) -> int:
    """Number of picks after which half of the predicted gain is reached."""
    assert arm.selection is not None
    gained = arm.selection.gains.cumsum(0)
    return int((gained <= gained.min() / 2).nonzero()[0]) + 1


def table(lines: Sequence[Sequence[str]]) -> str:
    """Lines, the header first, in Markdown."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _short(text: str, width: int = 60) -> str:
    """The end of a text on one line: questions of a family begin alike."""
    flat = " ".join(text.split()).replace("|", "/")
    return flat if len(flat) <= width else f"… {flat[-width:]}"
