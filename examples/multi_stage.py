"""Which rows of its pre-training made a fine-tuned classifier say this?

    python examples/multi_stage.py [--quick] [--text FILE] [--out runs/multi-stage]

A small GPT-NeoX learns to continue sentences, then gets another head and learns to classify: the topic of sentences
made on the spot, or for the lines of a file (Penn Treebank, tiny Shakespeare) whether their words are in order or
shuffled. A CurvatureRecorder in each of the two runs keeps what influence takes from it; two folders and the two
models are all that is needed later. Printed are the pre-training rows that helped some predictions most, and how far
fine-tuning moved each layer: the method takes the two models to be near each other.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from instruction_pool import PadRight
from lightning.pytorch import LightningModule, Trainer, seed_everything
from tiny_text import PAD, Words, lines_of, made_sentences, neox_config
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, PreTrainedModel

from lightning_influence import CurvatureRecorder, MultiStageInfluence, Scores

BATCH = 32
PRETRAINING_RATE = 3e-3
CLASSES_OF_LINES = ("in order", "shuffled")


@dataclass(frozen=True)
class Texts:
    """What either stage learns from, and what is asked about.

    Attributes:
        pretraining: Sentences, and of each its topic where it has one.
        finetuning: Sentences and their class.
        asked: Others and their class.
        classes: Names of the classes.
    """

    pretraining: list[tuple[str, str]]
    finetuning: list[tuple[str, str]]
    asked: list[tuple[str, str]]
    classes: tuple[str, ...]


class Stage(LightningModule):
    """A model of transformers with its own loss; Adam."""

    def __init__(self, model: PreTrainedModel, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def texts(options: argparse.Namespace) -> Texts:
    """Three parts that share no line; of a file as many lines, drawn, as would be made."""
    n, labelled, asked = options.rows, options.labelled, options.queries
    if options.text is None:
        rows = made_sentences(n + labelled + asked, options.seed)
        return Texts(
            rows[:n], rows[n : n + labelled], rows[n + labelled :], tuple(sorted({topic for _, topic in rows}))
        )
    draw = random.Random(options.seed)
    lines = list(dict.fromkeys(lines_of(options.text)))
    if len(lines) < n + labelled + asked:
        raise ValueError(f"{options.text}: expected {n + labelled + asked} different lines, it has {len(lines)}.")
    drawn = draw.sample(lines, n + labelled + asked)
    classified = []
    for k, line in enumerate(drawn[n:]):
        words = line.split()
        if k % 2:
            draw.shuffle(words)
        classified.append((" ".join(words), CLASSES_OF_LINES[k % 2]))
    return Texts([(line, "") for line in drawn[:n]], classified[:labelled], classified[labelled:], CLASSES_OF_LINES)


def language_rows(rows: Sequence[tuple[str, str]], words: Words, length: int) -> list[dict[str, Tensor]]:
    """Every word is a target."""
    tokens = [torch.tensor(words.encode(text)[:length]) for text, _ in rows]
    return [{"input_ids": row, "labels": row} for row in tokens]


class Classified:
    """Collate function: sentences padded on the right, and the number of their class, [n]."""

    def __init__(self, words: Words, classes: Sequence[str], length: int) -> None:
        self.words, self.classes, self.length = words, classes, length

    def __call__(self, rows: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        batch = PadRight(PAD)(language_rows(rows, self.words, self.length))
        return {**batch, "labels": torch.tensor([self.classes.index(name) for _, name in rows])}


def fit(
    model: PreTrainedModel, data: DataLoader[Any], learning_rate: float, options: argparse.Namespace, name: str
) -> tuple[Stage, Path]:
    """The trained module, and where the recorder left its curvature."""
    seed_everything(options.seed, verbose=False)
    shutil.rmtree(options.out / name / CurvatureRecorder.default_name, ignore_errors=True)  # of an earlier run
    stage = Stage(model, learning_rate)
    recorder = CurvatureRecorder(dirpath=str(options.out / name))
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        devices=1,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(stage, data)
    return stage.eval(), Path(recorder.records[-1].path)


def trace(options: argparse.Namespace, found: Texts) -> tuple[Scores, MultiStageInfluence, list[str]]:
    """Scores of all pre-training rows for all questions, and what the classifier says to these."""
    words = Words((text for text, _ in (*found.pretraining, *found.finetuning)), limit=options.vocabulary)
    config = neox_config(len(words), options.width, options.layers, options.length)
    pad, classified = PadRight(PAD), Classified(words, found.classes, options.length)
    corpus = DataLoader(language_rows(found.pretraining, words, options.length), BATCH, shuffle=True, collate_fn=pad)
    labelled = DataLoader(found.finetuning, BATCH, shuffle=True, collate_fn=classified)
    questions = DataLoader(found.asked, BATCH, collate_fn=classified)

    torch.manual_seed(options.seed)
    language_model = GPTNeoXForCausalLM(config)
    config.num_labels = len(found.classes)
    classifier = GPTNeoXForSequenceClassification(config)

    pretrained, first = fit(language_model, corpus, PRETRAINING_RATE, options, "pre-training")
    classifier.gpt_neox.load_state_dict(language_model.gpt_neox.state_dict())
    finetuned, second = fit(classifier, labelled, options.rate, options, "fine-tuning")
    said = [found.classes[k] for batch in questions for k in finetuned(**batch).logits.argmax(dim=1).tolist()]

    influence = MultiStageInfluence.from_stores(pretrained, finetuned, first, second)
    return influence.score(questions, corpus), influence, said


def lines(scores: Scores, found: Texts, said: Sequence[str], top: int) -> list[dict[str, Any]]:
    """For each question its most helpful rows, best first."""
    rows = []
    for k, (text, name) in enumerate(found.asked):
        for rank, (place, score) in enumerate(scores.top(top, k), start=1):
            row, topic = found.pretraining[int(place)]
            asked = {"query": k, "query_text": text, "class": name, "predicted": said[k]}
            rows.append({**asked, "rank": rank, "row": place, "score": score, "text": row, "topic": topic})
    return rows


def show(rows: Sequence[dict[str, Any]], influence: MultiStageInfluence, top: int) -> str:
    """The first questions with their rows, and the distances."""
    out = []
    for row in rows[: 3 * top]:
        if row["rank"] == 1:
            out.append(f"\n{row['query_text']}  [{row['class']}; the model says: {row['predicted']}]")
        out.append(f"{row['score']:>12.4g}  {row['text']}" + f"  [{row['topic']}]" * bool(row["topic"]))
    out.append("\nhow far fine-tuning moved each shared component, |change| / |weights|")
    out += [f"{moved.relative:>8.1%}  {name}" for name, moved in influence.proximity().items()]
    return "\n".join(out)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, help="a text file, a row a line, in place of sentences made on the spot")
    parser.add_argument("--rows", type=int, default=2000, help="of the pre-training")
    parser.add_argument("--labelled", type=int, default=400, help="rows of the fine-tuning")
    parser.add_argument("--queries", type=int, default=40, help="sentences whose prediction is traced")
    parser.add_argument("--top", type=int, default=5, help="rows that are kept for each of them")
    parser.add_argument("--epochs", type=int, default=5, help="of either stage")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of the fine-tuning; small stays near")
    parser.add_argument("--width", type=int, default=128, help="of the model")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--length", type=int, default=64, help="words of a row that are read, at most")
    parser.add_argument("--vocabulary", type=int, default=8000, help="words that have a token of their own")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer rows, within a minute")
    parser.add_argument("--seed", type=int, default=0, help="of rows, weights and order")
    parser.add_argument("--out", type=Path, default=Path("runs/multi-stage"), help="folder for everything written")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.labelled, options.queries = 240, 120, 12
        options.width, options.layers, options.epochs, options.length = 32, 2, 12, 24
    if min(options.rows, options.labelled, options.queries, options.top, options.epochs, options.layers) < 1:
        parser.error("expected --rows, --labelled, --queries, --top, --epochs and --layers >= 1")
    if options.width % 8 or options.length < 3 or options.vocabulary < 4:
        parser.error("expected a --width divisible by 8, --length >= 3 and --vocabulary >= 4")
    if options.text is not None and not options.text.is_file():
        parser.error(f"expected --text to be a file, {options.text} is none")
    return options


def silence() -> None:
    """Notes of short fits."""
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", "The number of training batches")
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    silence()
    try:
        found = texts(options)
    except ValueError as error:
        sys.exit(f"multi_stage.py: {error}")
    scores, influence, said = trace(options, found)
    rows = lines(scores, found, said, options.top)
    proximity = {name: moved._asdict() for name, moved in influence.proximity().items()}
    (options.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (options.out / "proximity.json").write_text(json.dumps(proximity, indent=1), encoding="utf-8")
    right = sum(a == b for a, (_, b) in zip(said, found.asked, strict=True))
    print(f"{len(found.pretraining)} rows of pre-training; {right} of {len(said)} questions classified rightly")
    print(show(rows, influence, options.top))
    print(f"\nall questions: {options.out / 'rows.jsonl'}")


if __name__ == "__main__":
    main(sys.argv[1:])
